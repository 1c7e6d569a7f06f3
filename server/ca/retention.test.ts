import { describe, expect, test } from 'vitest'
import type { Certificate } from './certificate.ts'
import { defaultRetention, isDispensable, leastRetention, RetentionSettings } from './retention.ts'

const day = 86_400_000

describe('which certificates are dispensable', () => {
  const end = Date.UTC(2027, 0, 10)
  const one = { profile: 'device-tls', status: 'valid', replacedAt: end - day, notAfter: end } as const
  const of = { retention: leastRetention, now: end + leastRetention + 1, caRevokedAt: undefined }
  test.for<readonly [string, boolean, Partial<Certificate>, Partial<{ retention: number; now: number; caRevokedAt: number }>]>([
    ['replaced, ended, and its time is over', true, {}, {}],
    ['its time is over now', false, {}, { now: end + leastRetention }],
    ['it has not ended', false, {}, { now: end - 1 }],
    ['another policy', false, {}, { retention: defaultRetention }],
    ['not replaced: its device is away', false, { replacedAt: undefined as never }, {}],
    ['an identity', false, { profile: 'device-identity' }, {}],
    ['of the server', false, { profile: 'server-tls' }, {}],
    ['revoked', false, { status: 'revoked' }, {}],
    ['on hold', false, { status: 'held' }, {}],
    ['in force when its CA was revoked', false, {}, { caRevokedAt: end - 1 }],
    ['over when its CA was revoked', true, {}, { caRevokedAt: end }],
  ])('%s: %s', ([, is, certificate, policy]) => {
    const made = { ...one, ...certificate } as Certificate
    expect(isDispensable(made, { ...of, ...policy })).toBe(is)
  })

  test.for<readonly [string, number | null | undefined]>([
    ['7d', 7 * day],
    ['30d', 30 * day],
    ['forever', null],
    ['6d', undefined],
    ['0d', undefined],
    ['30', undefined],
    ['-8d', undefined],
    ['1e3d', undefined],
  ])('a configuration says %s', ([said, time]) => {
    const parsed = RetentionSettings.safeParse({ superseded: said })
    expect(parsed.success ? parsed.data.superseded : undefined).toBe(time)
  })
})
