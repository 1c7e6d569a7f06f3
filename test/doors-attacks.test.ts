import { randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Attester } from '@fleetkey/device-agent/attesters/attester.ts'
import { idevidAttester } from '@fleetkey/device-agent/attesters/idevid.ts'
import { softwareSecureElement, type SecureElement } from '@fleetkey/device-agent/secure-element.ts'
import type { SoftwareKeys } from '@fleetkey/device-agent/software-keys.ts'
import { newTlsKey, tlsCsr } from '@fleetkey/device-agent/tls-key.ts'
import { makeEkCa } from '@fleetkey/firmware-sim/factory/ek-ca.ts'
import { makeElement, makeIdevidCa } from '@fleetkey/firmware-sim/factory/idevid-ca.ts'
import { manifestJson, type BoardRecord } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { newToken, parseToken, tokenText } from '@fleetkey/protocol/enrolment-token.ts'
import { DeviceId, GroupId } from '@fleetkey/protocol/ids.ts'
import type { AnswerOf, BodyOf, HelloOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { deviceHandler } from '@fleetkey/server/api/device.ts'
import { idevidReasons } from '@fleetkey/server/attestation/reasons/idevid.ts'
import { tokenReasons } from '@fleetkey/server/attestation/reasons/token.ts'
import { hasIdentity, type Device } from '@fleetkey/server/fleet/device.ts'
import type { DeviceRef } from '@fleetkey/server/flows/context.ts'
import { importEndorsement } from '@fleetkey/server/flows/endorsement.ts'
import { createTokens, revokeToken } from '@fleetkey/server/flows/enrolment-token.ts'
import { addMembers, createGroup, setGroupPolicy } from '@fleetkey/server/flows/group.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { revokeDevice } from '@fleetkey/server/flows/revoke.ts'
import { addStation } from '@fleetkey/server/flows/station.ts'
import { attemptAt, byToken, softwareKeys, type Attempt } from './enrolling.ts'
import { operator, station, testContext, type TestContext } from './harness.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const hour = 3_600_000

let ctx: TestContext
let handle: (from: DeviceRef, bytes: Uint8Array) => Promise<void>
let factory: ReturnType<typeof station>
let element: SecureElement
let ca: ReturnType<typeof makeIdevidCa>

const byElement = async (of: SecureElement = element, keys?: SoftwareKeys): Promise<Attester> => idevidAttester(keys ?? (await softwareKeys()), of)

const elementOf = (serial: string, curve?: 'secp384r1'): SecureElement => {
  const made = makeElement(ca, serial, ctx.clock.now, curve)
  return softwareSecureElement(made.key, [made.certificate])
}

const batch = async (id: string, boards: readonly BoardRecord[]): Promise<void> =>
  void (await importBatch(ctx, operator(), { ...factory.signed(manifestJson({ batch: id, model: 'gateway', station: factory.id }, boards)), format: 'json' }))

const token = async (of: { batch?: string; device?: string; life?: number } = {}): Promise<string> => {
  const [made] = await createTokens(ctx, operator(), {
    batch: of.batch ?? 'b1',
    device: of.device === undefined ? undefined : DeviceId.parse(of.device),
    count: 1,
    life: of.life ?? hour,
  })
  return new TextDecoder().decode(made?.text.bytes())
}
const idOf = (text: string): string => Buffer.from(parseToken(text).id).toString('hex')

beforeEach(async () => {
  ctx = await testContext()
  handle = deviceHandler(ctx, { policy: { requireEkCertificate: true }, reportEvery: 300 })
  factory = station()
  ca = makeIdevidCa(ctx.clock.now)
  element = elementOf('SE-1')
  await addStation(ctx, operator(), { id: factory.id, publicKey: factory.publicKey })
  await importEndorsement(ctx, operator(), { certificate: toPem('CERTIFICATE', ca.certificate), test: false, for: 'idevid' })
  await batch('b1', [{ serial: 'SE-1', idevid: element.spki }, { serial: 'PL-1' }, { serial: 'PL-2' }, { serial: 'GW-1', ek: random(64) }])
  await batch('b2', [{ serial: 'PL-9' }])
})
afterEach(async () => await ctx.close())

const attempt = async (of: Attempt): Promise<string> => await attemptAt({ ctx, handle }, of)

const proving =
  <M extends 'idevid' | 'token'>(change: Partial<AnswerOf<M>['proven']>) =>
  (body: BodyOf<'answer'>): BodyOf<'answer'> => ({ ...body, proven: { ...body.proven, ...change } as AnswerOf<M>['proven'] })
const presenting =
  <M extends 'idevid' | 'token'>(change: Partial<HelloOf<M>['presented']>) =>
  (body: BodyOf<'hello'>): BodyOf<'hello'> => ({ ...body, presented: { ...body.presented, ...change } as HelloOf<M>['presented'] })

const certificatesOf = async (id: string): Promise<number> => await ctx.store.count('certificate', { device: id })

/** What the store holds of a device is set as if something had gone wrong before. */
const rewrite = async (id: string, change: (row: Device) => Device): Promise<void> => {
  const row = await ctx.store.get('device', DeviceId.parse(id))
  if (row === undefined) throw new Error(`no ${id}`)
  const entry = { at: ctx.now(), caller: 'test', from: 'test', action: 'test', subject: id, outcome: 'done' as const, code: null, detail: '' }
  await ctx.store.commit({ writes: [{ table: 'device', do: 'update', row: change(row) }], entries: [entry] })
}

describe('by factory identity', () => {
  const genuine = async (more: Partial<Attempt> = {}): Promise<string> => await attempt({ serial: 'SE-1', attester: await byElement(), ...more })

  test('a genuine device is admitted, and again: with new keys it is the same device', async () => {
    expect(await genuine()).toBe('admitted')
    expect(await genuine()).toBe('admitted')
    expect(await ctx.store.get('device', DeviceId.parse('se-1'))).toMatchObject({ state: 'enrolled', assurance: 'idevid' })
  })

  test('one of P-384 too', async () => {
    const other = elementOf('SE-384', 'secp384r1')
    await batch('b3', [{ serial: 'SE-384', idevid: other.spki }])
    expect(await genuine({ serial: 'SE-384', attester: await byElement(other) })).toBe('admitted')
  })

  /** The certificate of the genuine one, the key of another. */
  const withoutKey = (): SecureElement => ({ ...elementOf('SE-1'), chain: element.chain, spki: element.spki })

  const cases: readonly (readonly [string, string, () => Promise<string>])[] = [
    ['idevid.possession', 'the certificate without its key', async () => await genuine({ attester: await byElement(withoutKey()) })],
    ['idevid.possession', 'relayed from another connection', async () => await genuine({ deviceExporter: random(32) })],
    [
      'idevid.possession',
      'the request of another key',
      async () => await genuine({ answer: async (body) => ({ ...body, csr: { ...body.csr, ldevid: await tlsCsr(newTlsKey(), 'SE-1') } }) }),
    ],
    [
      'idevid.possession',
      'an answer that was recorded in another conversation',
      async () => {
        let recorded: BodyOf<'answer'> | undefined
        const attester = await byElement()
        expect(await genuine({ attester, answer: (body) => (recorded = body) })).toBe('admitted')
        return await genuine({ attester, answer: (body) => ({ ...body, proven: recorded?.proven ?? body.proven }) })
      },
    ],
    ['manifest.unknown-idevid', 'a genuine secure element that is not ours', async () => await genuine({ attester: await byElement(elementOf('SE-2')) })],
    [
      'manifest.serial-mismatch',
      'a secure element of ours, for another serial',
      async () => {
        await genuine({ serial: 'PL-1' })
        return await lastOf('se-1')
      },
    ],
    [
      'identity.other-idevid',
      'a device that is bound to another',
      async () => {
        expect(await genuine()).toBe('admitted')
        await rewrite('se-1', (row) => (hasIdentity(row) ? { ...row, keys: { ...row.keys, hardware: 'idevid/00' } as typeof row.keys } : row))
        return await genuine()
      },
    ],
    [
      'key.two-roles',
      'the IDevID key as LDevID key',
      async () => {
        const keys = await softwareKeys()
        return await genuine({ attester: await byElement(element, { ...keys, recipient: { ...keys.recipient, spki: keys.ldevid.spki } }) })
      },
    ],
    [
      'method.mixed',
      'a token where a factory identity was promised',
      async () => await genuine({ answer: (body) => ({ ...body, proven: { method: 'token', proof: null, signature: random(64) } }) }),
    ],
    ['csr.tls.binding', 'a TLS key that was not bound', async () => await genuine({ answer: (body) => ({ ...body, binding: random(64) }) })],
    [
      'idevid.cert.unknown-issuer',
      'the CA of the EKs vouches',
      async () => {
        const ekCa = makeEkCa(ctx.clock.now)
        await importEndorsement(ctx, operator(), { certificate: toPem('CERTIFICATE', ekCa.certificate), test: false })
        const made = makeElement(ekCa, 'SE-1', ctx.clock.now)
        return await genuine({ attester: await byElement(softwareSecureElement(made.key, [made.certificate])) })
      },
    ],
    [
      'device.revoked',
      'after it was revoked',
      async () => {
        await revokeDevice(ctx, operator(), DeviceId.parse('se-1'), 'lost')
        return await genuine()
      },
    ],
  ]
  test.each(cases)('%s: %s', async (reason, _what, run) => {
    expect(await run()).toBe(reason)
  })

  const waiting = async (): Promise<string[]> =>
    (await ctx.store.find('outbox', { where: { device: 'se-1' }, limit: 10 })).map(({ subject }) => subject).toSorted()
  const put = async (...subjects: readonly string[]): Promise<void> => {
    const entry = { at: ctx.now(), caller: 'test', from: 'test', action: 'test', subject: 'se-1', outcome: 'done' as const, code: null, detail: '' }
    const row = { device: DeviceId.parse('se-1'), version: 0, bytes: new Uint8Array(), createdAt: ctx.now() }
    await ctx.store.commit({
      writes: subjects.map((subject) => ({ table: 'outbox', do: 'insert', row: { ...row, id: `se-1/${subject}`, subject } })),
      entries: [entry],
    })
  }

  test('back with a new disk: what waits for it is wrapped to its new recipient key, the rest stays', async () => {
    const keys = await softwareKeys()
    expect(await genuine({ attester: await byElement(element, keys) })).toBe('admitted')
    await put('delivery/telemetry/1', 'retire/telemetry')
    expect(await genuine({ attester: await byElement(element, keys) })).toBe('admitted')
    expect(await waiting()).toEqual(['delivery/telemetry/1', 'retire/telemetry'])
    expect(await genuine()).toBe('admitted')
    expect(await waiting()).toEqual(['retire/telemetry'])
  })

  test('back with a new disk, and unacceptable meanwhile: quarantined in one commit, nothing waits but what it is to erase', async () => {
    const plant = GroupId.parse('plant')
    await createGroup(ctx, operator(), plant)
    await addMembers(ctx, operator(), plant, { batch: 'b1' })
    expect(await genuine()).toBe('admitted')
    await put('delivery/telemetry/1', 'retire/telemetry')
    // As if the change of policy came between its appraisal and that of everybody else.
    const group = await ctx.store.get('group', plant)
    if (group === undefined) throw new Error('no group')
    const entry = { at: ctx.now(), caller: 'test', from: 'test', action: 'test', subject: plant, outcome: 'done' as const, code: null, detail: '' }
    await ctx.store.commit({ writes: [{ table: 'group', do: 'update', row: { ...group, policy: { ...group.policy, minimumRelease: 1 } } }], entries: [entry] })
    expect(await genuine()).toBe('admitted')
    expect(await ctx.store.get('device', DeviceId.parse('se-1'))).toMatchObject({ state: 'quarantined', verdict: { reason: 'firmware.unmeasured' } })
    expect(await waiting()).toEqual(['retire/telemetry'])
    // And once more: it keeps its identity, and stays quarantined.
    expect(await genuine()).toBe('admitted')
    expect((await ctx.store.get('device', DeviceId.parse('se-1')))?.state).toBe('quarantined')
  })

  test('a CA for EKs is not taken for IDevIDs as well', async () => {
    const certificate = toPem('CERTIFICATE', ca.certificate)
    await expect(importEndorsement(ctx, operator(), { certificate, test: false })).rejects.toMatchObject({ code: 'conflict', reason: 'endorsement.purpose' })
  })
})

const lastOf = async (id: string): Promise<string> => (await ctx.store.get('device', DeviceId.parse(id)))?.lastRefusal?.reason ?? 'nothing'

describe('by token', () => {
  const enrol = async (text: string | null, more: Partial<Attempt> = {}): Promise<string> =>
    await attempt({ serial: 'PL-1', attester: await byToken(text), ...more })

  test('a token lets one board of its batch in, which comes back without it', async () => {
    const [keys, text] = [await softwareKeys(), await token()]
    expect(await enrol(text, { attester: await byToken(text, keys) })).toBe('admitted')
    expect(await ctx.store.get('device', DeviceId.parse('pl-1'))).toMatchObject({
      state: 'enrolled',
      assurance: 'token',
      verdict: { reason: 'firmware.unmeasured' },
    })
    expect(await ctx.store.get('enrolmentToken', idOf(text))).toMatchObject({ spent: { device: 'pl-1' } })
    expect(await enrol(null, { attester: await byToken(null, keys), purpose: 'return' })).toBe('admitted')
    // The file may still lie there: it is neither needed nor spent again.
    expect(await enrol(text, { attester: await byToken(text, keys), purpose: 'return' })).toBe('admitted')
  })

  test('it is in nothing that is stored, sent or logged', async () => {
    const text = await token()
    const secret = Buffer.from(parseToken(text).secret.bytes())
    expect(await enrol(text)).toBe('admitted')
    const rows = await Promise.all(
      (['enrolmentToken', 'challenge', 'request', 'device', 'setting'] as const).map(async (table) => await ctx.store.find(table, { limit: 1000 })),
    )
    const all = Buffer.concat([
      ...rows
        .flat()
        .flatMap((row) =>
          Object.values(row as object).map((value) => (value instanceof Uint8Array ? Buffer.from(value) : Buffer.from(JSON.stringify(value) ?? ''))),
        ),
      Buffer.from(JSON.stringify([await ctx.entries(), ctx.lines])),
    ])
    for (const form of [secret, Buffer.from(secret.toString('hex')), Buffer.from(secret.toString('base64url')), Buffer.from(text)])
      expect(all.includes(form)).toBe(false)
  })

  const cases: readonly (readonly [string, string, () => Promise<string>])[] = [
    ['token.missing', 'no token', async () => await enrol(null)],
    ['token.unknown', 'one that was made up', async () => await enrol(tokenText(newToken(random)))],
    [
      'token.revoked',
      'one that was taken back',
      async () => {
        const text = await token()
        await revokeToken(ctx, operator(), idOf(text))
        return await enrol(text)
      },
    ],
    [
      'token.revoked',
      'taken back between challenge and answer',
      async () => {
        const text = await token()
        return await enrol(text, { between: async () => await revokeToken(ctx, operator(), idOf(text)) })
      },
    ],
    [
      'token.expired',
      'one that is past its time',
      async () => {
        const text = await token({ life: 1000 })
        ctx.clock.now += 2000
        return await enrol(text)
      },
    ],
    [
      'token.expired',
      'past its time between challenge and answer',
      async () => {
        const text = await token({ life: 20_000 })
        return await enrol(text, { between: () => (ctx.clock.now += 30_000) })
      },
    ],
    ['token.other-batch', 'of another batch', async () => await enrol(await token({ batch: 'b2' }))],
    ['token.other-device', 'for another device', async () => await enrol(await token({ device: 'pl-2' }))],
    [
      'token.spent',
      'used by another board',
      async () => {
        const text = await token()
        expect(await attempt({ serial: 'PL-2', attester: await byToken(text) })).toBe('admitted')
        return await enrol(text)
      },
    ],
    [
      'token.identity-exists',
      'for a board that has its identity',
      async () => {
        expect(await enrol(await token())).toBe('admitted')
        const text = await token()
        const reason = await enrol(text)
        expect(await ctx.store.get('enrolmentToken', idOf(text))).toMatchObject({ spent: null })
        return reason
      },
    ],
    [
      'token.proof',
      'its name without its secret',
      async () => {
        const { id } = parseToken(await token())
        return await enrol(tokenText({ ...newToken(random), id }))
      },
    ],
    ['token.proof', 'its name, and no proof at all', async () => await enrol(await token(), { answer: proving<'token'>({ proof: null }) })],
    [
      'token.proof',
      'a proof that was recorded in another conversation',
      async () => {
        const [keys, text] = [await softwareKeys(), await token()]
        const attester = await byToken(text, keys)
        let proof: Uint8Array | null = null
        // Its answer never arrives: nothing is spent, and the conversation is known to the attacker.
        expect(
          await enrol(text, {
            attester,
            answer: (body) => {
              proof = (body as AnswerOf<'token'>).proven.proof
              return { ...body, proven: { method: 'token', proof: random(32), signature: (body as AnswerOf<'token'>).proven.signature } }
            },
          }),
        ).toBe('token.proof')
        return await enrol(text, { attester, answer: (body) => proving<'token'>({ proof })(body) })
      },
    ],
    ['ldevid.possession', 'relayed from another connection', async () => await enrol(await token(), { deviceExporter: random(32) })],
    ['ldevid.possession', 'signed by another key', async () => await enrol(await token(), { answer: proving<'token'>({ signature: random(64) }) })],
    [
      'ldevid.possession',
      'the request of another key',
      async () => await enrol(await token(), { answer: async (body) => ({ ...body, csr: { ...body.csr, ldevid: await tlsCsr(newTlsKey(), 'PL-1') } }) }),
    ],
    [
      'ldevid.expired',
      'back after its LDevID certificate has ended',
      async () => {
        const keys = await softwareKeys()
        expect(await enrol(await token(), { attester: await byToken(null, keys) })).toBe('token.missing')
        const text = await token()
        expect(await enrol(text, { attester: await byToken(text, keys) })).toBe('admitted')
        ctx.clock.now += 4 * 365 * 24 * hour
        return await enrol(null, { attester: await byToken(null, keys), purpose: 'return' })
      },
    ],
    [
      'key.two-roles',
      'one key signs and opens',
      async () => {
        const keys = await softwareKeys()
        return await enrol(null, { attester: await byToken(null, keys), hello: presenting<'token'>({ recipient: keys.ldevid.spki }) })
      },
    ],
    ['manifest.no-token-row', 'for a board with a TPM', async () => await enrol(await token(), { serial: 'GW-1' })],
    ['manifest.no-token-row', 'for a board with a secure element', async () => await enrol(await token(), { serial: 'SE-1' })],
    [
      'identity.other-serial',
      'a device that is bound to hardware of another kind',
      async () => {
        expect(await enrol(await token())).toBe('admitted')
        await rewrite('pl-1', (row) => (hasIdentity(row) ? { ...row, keys: { ...row.keys, hardware: 'idevid/00' } as typeof row.keys } : row))
        return await enrol(await token())
      },
    ],
    [
      'method.mixed',
      'a factory identity where a token was promised',
      async () => await enrol(await token(), { answer: (body) => ({ ...body, proven: { method: 'idevid', signature: random(64) } }) }),
    ],
    [
      'firmware.unmeasured',
      'into a group that demands measured firmware',
      async () => {
        const plant = GroupId.parse('plant')
        await createGroup(ctx, operator(), plant)
        await addMembers(ctx, operator(), plant, { batch: 'b1' })
        await setGroupPolicy(ctx, operator(), plant, { minimumRelease: 1 })
        const text = await token()
        const reason = await enrol(text)
        expect(await ctx.store.get('enrolmentToken', idOf(text))).toMatchObject({ spent: null })
        return reason
      },
    ],
    [
      'device.revoked',
      'after it was revoked',
      async () => {
        expect(await enrol(await token())).toBe('admitted')
        await revokeDevice(ctx, operator(), DeviceId.parse('pl-1'), 'lost')
        return await enrol(await token())
      },
    ],
  ]
  test.each(cases)('%s: %s', async (reason, _what, run) => {
    expect(await run()).toBe(reason)
  })

  test('sixty-four boards use one token at once: one wins, and no other gets a certificate', { timeout: 60_000 }, async () => {
    const boards = Array.from({ length: 64 }, (_, at) => ({ serial: `MANY-${at}` }))
    await batch('many', boards)
    const text = await token({ batch: 'many' })
    const before = await ctx.store.count('intent')
    // Every one has its challenge before the first answers.
    const gate = Promise.withResolvers<void>()
    let waiting = 0
    const between = async (): Promise<void> => {
      if (++waiting === boards.length) gate.resolve()
      await gate.promise
    }
    const outcomes = await Promise.all(boards.map(async ({ serial }) => await attempt({ serial, attester: await byToken(text), between, alone: false })))
    expect(outcomes.filter((outcome) => outcome === 'admitted')).toHaveLength(1)
    expect(outcomes.filter((outcome) => outcome !== 'admitted' && outcome !== 'token.spent')).toEqual([])
    expect(await ctx.store.count('device', { batch: 'many', state: 'enrolled' })).toBe(1)
    expect(await ctx.store.count('intent')).toBe(before + 2)
    const spent = (await ctx.entries()).filter(({ detail }) => detail.includes(`token ${idOf(text)} spent`))
    expect(spent).toHaveLength(1)
  })

  test('two tokens for one board at once: one identity', async () => {
    const outcomes = await Promise.all([await token(), await token()].map(async (text) => await enrol(text)))
    expect(outcomes.toSorted()).toEqual(['admitted', 'token.identity-exists'])
    expect(await certificatesOf('pl-1')).toBe(2)
  })

  test.each(['token.spent', 'issue.intended', 'issue.signed', 'enrol.issued'])(
    'the process ends at %s: the same key goes on with the same token, no other does',
    async (step) => {
      const [keys, text] = [await softwareKeys(), await token()]
      let left = 1
      const broken: TestContext = {
        ...ctx,
        step: (name) => {
          if (name === step && left-- > 0) throw new Error('the process ends here')
        },
      }
      handle = deviceHandler(broken, { policy: { requireEkCertificate: true }, reportEvery: 300 })
      expect(await enrol(text, { attester: await byToken(text, keys) })).toBe('internal')
      handle = deviceHandler(ctx, { policy: { requireEkCertificate: true }, reportEvery: 300 })
      const thief = await enrol(text, { serial: 'PL-2' })
      expect(thief).toBe('token.spent')
      expect(await enrol(text)).toBe(step === 'enrol.issued' ? 'token.identity-exists' : 'token.spent')
      expect(await enrol(text, { attester: await byToken(text, keys) })).toBe('admitted')
    },
  )

  test.each(['token.created', 'token.revoked'])('the process ends at %s: done, and only untold', async (step) => {
    const broken: TestContext = {
      ...ctx,
      step: (name) => {
        if (name === step) throw new Error('the process ends here')
      },
    }
    if (step === 'token.created') {
      await expect(createTokens(broken, operator(), { batch: 'b1', count: 2, life: hour })).rejects.toThrow('the process ends here')
      expect(await ctx.store.count('enrolmentToken', { batch: 'b1' })).toBe(2)
      return
    }
    const text = await token()
    await expect(revokeToken(broken, operator(), idOf(text))).rejects.toThrow('the process ends here')
    expect(await enrol(text)).toBe('token.revoked')
    await expect(revokeToken(ctx, operator(), idOf(text))).rejects.toMatchObject({ code: 'conflict' })
  })

  const orders: readonly (readonly [string, Parameters<typeof createTokens>[2], string])[] = [
    ['an unknown batch', { batch: 'b7', count: 1, life: hour }, 'not-found'],
    ['a device of another batch', { batch: 'b2', device: DeviceId.parse('pl-1'), count: 1, life: hour }, 'not-found'],
    ['a board with a TPM', { batch: 'b1', device: DeviceId.parse('gw-1'), count: 1, life: hour }, 'conflict'],
    ['two for one device', { batch: 'b1', device: DeviceId.parse('pl-1'), count: 2, life: hour }, 'malformed'],
    ['for ever', { batch: 'b1', count: 1, life: 400 * 24 * hour }, 'malformed'],
  ]
  test.each(orders)('no token is made: %s', async (_what, order, code) => {
    await expect(createTokens(ctx, operator(), order)).rejects.toMatchObject({ code })
    expect(await ctx.store.count('enrolmentToken')).toBe(0)
  })
  test('nor by an auditor', async () =>
    await expect(createTokens(ctx, operator('auditor'), { batch: 'b1', count: 1, life: hour })).rejects.toMatchObject({ code: 'forbidden' }))
  test('a token that was used is not taken back', async () => {
    const text = await token()
    expect(await enrol(text)).toBe('admitted')
    await expect(revokeToken(ctx, operator(), idOf(text))).rejects.toThrow(/revoke the device/)
  })
})

describe('the text of a token', () => {
  test('is read as it was written, white space around it forgiven', () => {
    const made = newToken(random)
    const read = parseToken(` ${tokenText(made)}\n`)
    expect(read.id).toEqual(made.id)
    expect(read.secret.equals(made.secret)).toBe(true)
  })
  test.each(['', 'fkt1-', `fkt2-${'A'.repeat(64)}`, `fkt1-${'A'.repeat(63)}`, `fkt1-${'A'.repeat(65)}`, `fkt1-${'A'.repeat(63)}=`])('%j is none', (text) =>
    expect(() => parseToken(text)).toThrow(Problem),
  )
})

test('every reason of the two methods has a test that is named after it', () => {
  const sources = ['idevid-cases.test.ts', 'doors-attacks.test.ts'].map((name) => readFileSync(new URL(name, import.meta.url), 'utf8')).join('\n')
  const missing = Object.keys({ ...idevidReasons, ...tokenReasons }).filter(
    (code) => !new RegExp(`\\[\\s*'${code.replaceAll('.', '\\.')}',\\s*'`).test(sources),
  )
  expect(missing).toEqual([])
})
