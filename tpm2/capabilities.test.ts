import { randomBytes } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { concat, TpmFormatError, u16, u32, u8 } from './bytes.ts'
import { algorithmsOf, banksOf, commandsOf, curvesOf, missingIn, properties, specName } from './capabilities.ts'
import { alg, command, curve } from './constants.ts'
import { rc, TpmError } from './errors.ts'
import { duration, lockoutOf, lockoutText, type Lockout } from './lockout.ts'
import { Tpm } from './tpm.ts'

/** A TPM that answers GetCapability from lists, a few items a page, as it likes. */
const telling = (answer: (which: number, first: number, count: number) => Uint8Array) => {
  const transport = {
    send: async (bytes: Uint8Array) => {
      const [which = 0, first = 0, count = 0] = [10, 14, 18].map((at) => Buffer.from(bytes).readUInt32BE(at))
      const body = answer(which, first, count)
      return await Promise.resolve(concat(u16(0x8001), u32(10 + body.length), u32(0), body))
    },
    close: async () => await Promise.resolve(),
  }
  return new Tpm(transport, { random: (length) => new Uint8Array(randomBytes(length)) })
}
const page = (which: number, more: boolean, ...items: readonly Uint8Array[]): Uint8Array => concat(u8(more ? 1 : 0), u32(which), u32(items.length), ...items)

const everything = {
  commands: new Set<number>(Object.values(command)),
  algorithms: new Set<number>(Object.values(alg)),
  curves: new Set<number>([curve.p256]),
  banks: [{ hash: alg.sha256, pcrs: [0, 1, 7] }],
}

describe('what is missing is named, with what it is for', () => {
  test('nothing', () => expect(missingIn(everything)).toEqual([]))

  const without = (set: ReadonlySet<number>, ...gone: readonly number[]): ReadonlySet<number> => new Set([...set].filter((one) => !gone.includes(one)))
  const cases: readonly (readonly [string, Partial<typeof everything> | object, object])[] = [
    ['no P-256', { curves: new Set([curve.p384]) }, { name: 'curve P-256', for: 'every key', needed: true }],
    ['no SHA-256 bank', { banks: [{ hash: alg.sha1, pcrs: [0] }] }, { name: 'SHA-256 PCR bank', for: 'attestation', needed: true }],
    ['a SHA-256 bank that is off', { banks: [{ hash: alg.sha256, pcrs: [] }] }, { name: 'SHA-256 PCR bank (present, but switched off)', needed: true }],
    ['no ECDSA', { algorithms: without(everything.algorithms, alg.ecdsa) }, { name: 'ECDSA', needed: true }],
    ['no TPM2_ECDH_ZGen', { commands: without(everything.commands, command.ecdhZGen) }, { name: 'TPM2_ECDH_ZGen', needed: true }],
    ['no TPM2_HMAC', { commands: without(everything.commands, command.hmac) }, { name: 'TPM2_HMAC', for: 'keys with protection "tpm"', needed: false }],
    ['no TPM2_PolicyAuthorize', { commands: without(everything.commands, command.policyAuthorize) }, { name: 'TPM2_PolicyAuthorize', needed: false }],
  ]
  test.each(cases)('%s', (_name, change, want) => expect(missingIn({ ...everything, ...change })).toEqual([expect.objectContaining(want)]))

  test('names as the specification has them', () => {
    expect((['createPrimary', 'nvReadPublic', 'pcrRead', 'policyPcr', 'hmacStart'] as const).map(specName)).toEqual([
      'TPM2_CreatePrimary',
      'TPM2_NV_ReadPublic',
      'TPM2_PCR_Read',
      'TPM2_PolicyPCR',
      'TPM2_HMAC_Start',
    ])
  })
})

describe('lists that come in pages', () => {
  test('are read to their end, the groups kept apart', async () => {
    const all: readonly (readonly [number, number])[] = [
      [0x100, 1],
      [0x105, 2],
      [0x12d, 3],
      [0x200, 4],
    ]
    const tpm = telling((which, first) => {
      const rest = all.filter(([id]) => id >= first)
      return page(which, rest.length > 1, ...rest.slice(0, 1).map(([id, value]) => concat(u32(id), u32(value))))
    })
    expect([...(await properties(tpm, 0x100))]).toEqual([
      [0x100, 1],
      [0x105, 2],
      [0x12d, 3],
    ])
  })

  test('commands, without those of the vendor', async () => {
    const tpm = telling((which) => page(which, false, u32(0x0440_0131), u32(0x2000_0001), u32(0x0000_017b)))
    expect([...(await commandsOf(tpm))]).toEqual([0x131, 0x17b])
  })

  test('curves, algorithms, and banks of hashes that nobody here knows', async () => {
    expect([...(await curvesOf(telling((which) => page(which, false, u16(3), u16(4)))))]).toEqual([3, 4])
    expect([...(await algorithmsOf(telling((which) => page(which, false, concat(u16(0x0b), u32(4))))))]).toEqual([0x0b])
    const tpm = telling((which) => page(which, false, concat(u16(0x0012), u8(3), Uint8Array.of(1, 0, 0x80)), concat(u16(0x000b), u8(4), new Uint8Array(4))))
    expect(await banksOf(tpm)).toEqual([
      { hash: 0x12, pcrs: [0, 23] },
      { hash: 0x0b, pcrs: [] },
    ])
  })

  const hostile: readonly (readonly [string, (which: number, first: number) => Uint8Array])[] = [
    ['that never end', (which, first) => page(which, true, concat(u32(first), u32(0)))],
    ['that go back', (which) => page(which, true, concat(u32(0x100), u32(0)))],
    ['that announce more than is there', (which) => concat(u8(0), u32(which), u32(900))],
    ['that are too long', (which) => concat(u8(0), u32(which), u32(0xffff_ffff))],
    ['of another capability', () => page(1, false)],
  ]
  test.each(hostile)('lists %s: refused', async (_name, answer) => await expect(properties(telling(answer), 0x100)).rejects.toThrow(TpmFormatError))
})

describe('a lockout in plain words', () => {
  const state: Lockout = { locked: true, failures: 32, allowed: 32, interval: 7200, recovery: 86_400 }
  const cases: readonly (readonly [string, Partial<Lockout>, RegExp])[] = [
    ['with its times', {}, /32 wrong passwords, 32 are allowed; one more attempt is possible after 2 h, all are forgotten after 64 h without/],
    ['that does not end', { interval: 0 }, /it does not end by itself.*tpm reset-lockout/],
    ['of the lockout hierarchy', { locked: false }, /opens again after 24 h$/],
    ['of the lockout hierarchy until the next start', { locked: false, recovery: 0 }, /opens again at the next start of the TPM$/],
  ]
  test.each(cases)('%s', (_name, change, want) => expect(lockoutText({ ...state, ...change })).toMatch(want))

  test('read from properties', () => {
    const variable = new Map([
      [0x200, 0x207],
      [0x20e, 2],
      [0x20f, 5],
      [0x210, 60],
      [0x211, 30],
    ])
    expect(lockoutOf(variable)).toEqual({ locked: true, failures: 2, allowed: 5, interval: 60, recovery: 30 })
    expect(lockoutOf(new Map([[0x200, 0x7]])).locked).toBe(false)
  })

  test('durations', () => expect([0, 90, 600, 3600, 9000, 86_399].map(duration)).toEqual(['0 s', '90 s', '10 min', '1 h', '2 h 30 min', '24 h']))
})

describe('refusals', () => {
  const owner = 0x4000_0001
  const cases: readonly (readonly [string, number, readonly number[], Partial<TpmError>, RegExp])[] = [
    [
      'a wrong password of a hierarchy',
      0x9a2,
      [owner],
      { code: 0x9a2, wrongPassword: 'owner' },
      /BAD_AUTH of session 1 \(0x9a2\): the password of the owner hierarchy/,
    ],
    ['of the second one', 0xa8e, [0x8000_0000, 0x4000_000a], { wrongPassword: 'lockout' }, /lockout hierarchy/],
    ['a wrong value of a key', 0x98e, [0x8000_0000], { wrongPassword: undefined }, /AUTH_FAIL of session 1 \(0x98e\)$/],
    ['a wrong handle is no wrong password', 0x18b, [owner], { wrongPassword: undefined }, /HANDLE of handle 1/],
    ["the resource manager's own", 0x000b_0143, [], { code: rc.commandCode, wrongPassword: undefined }, /COMMAND_CODE \(0x143\)$/],
  ]
  test.each(cases)('%s', (_name, code, handles, want, text) => {
    const error = new TpmError(code, 'x', handles)
    expect(error).toMatchObject(want)
    expect(error.message).toMatch(text)
  })
})
