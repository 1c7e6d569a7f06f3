import { randomBytes } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Attester } from '@fleetkey/device-agent/attesters/attester.ts'
import { idevidAttester } from '@fleetkey/device-agent/attesters/idevid.ts'
import { tpm2Attester } from '@fleetkey/device-agent/attesters/tpm2.ts'
import { softwareSecureElement } from '@fleetkey/device-agent/secure-element.ts'
import { newTlsKey, tlsCsr } from '@fleetkey/device-agent/tls-key.ts'
import { createBoard, install } from '@fleetkey/firmware-sim/board/board.ts'
import { Flash } from '@fleetkey/firmware-sim/board/flash.ts'
import { makeEkCa } from '@fleetkey/firmware-sim/factory/ek-ca.ts'
import { personalise } from '@fleetkey/firmware-sim/factory/factory.ts'
import { makeElement, makeIdevidCa } from '@fleetkey/firmware-sim/factory/idevid-ca.ts'
import { manifestJson } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { buildRelease, referenceValues, simulatedImages } from '@fleetkey/firmware-sim/release/release.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { DeviceId, TenantId } from '@fleetkey/protocol/ids.ts'
import { readMessage, signMessage } from '@fleetkey/protocol/signed.ts'
import { tlsBinding } from '@fleetkey/protocol/transcript.ts'
import { inside, readUnsigned, tags, whole } from '@fleetkey/protocol/x509/der.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { deviceHandler } from '@fleetkey/server/api/device.ts'
import { methods } from '@fleetkey/server/attestation/methods.ts'
import type { Kms } from '@fleetkey/server/flows/context.ts'
import { importEndorsement } from '@fleetkey/server/flows/endorsement.ts'
import { createTokens } from '@fleetkey/server/flows/enrolment-token.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { importRelease } from '@fleetkey/server/flows/import-release.ts'
import { addStation } from '@fleetkey/server/flows/station.ts'
import { openDeviceKeys, provision } from '@fleetkey/tpm2/device-keys.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { attemptAt, byToken, softwareKeys, type ServerSide } from './enrolling.ts'
import { operator, station, testContext, type TestContext } from './harness.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const max = 1 << 20
const firmware = buildRelease({ model: 'gateway', name: '1.0.0', number: 1 }, simulatedImages('gateway/1.0.0', new TextEncoder().encode('agent')))

let ctx: TestContext
let side: ServerSide
/** Serials that the issuing CA signed, and whether each had its open intent when it did. */
let signed: { readonly serial: string; readonly intended: boolean }[]
let boards: Readonly<Record<'tpm2' | 'idevid' | 'token', { readonly serial: string; readonly attester: Attester; readonly eventLog?: Uint8Array }>>

/** Serial number of a TBSCertificate; undefined for anything else that is signed. */
const serialOf = (tbs: Uint8Array): string | undefined => {
  try {
    const fields = inside(whole(tbs, tags.sequence))
    return fields.optional(0xa0) === undefined ? undefined : Buffer.from(readUnsigned(fields.next(tags.integer))).toString('hex')
  } catch {
    return undefined
  }
}

beforeEach(async () => {
  const plain = await testContext()
  signed = []
  const kms: Kms = {
    ...plain.kms,
    async sign(batch) {
      for (const { purpose, data } of batch) {
        const serial = serialOf(data)
        if (purpose !== 'issuing-ca' && purpose !== 'root-ca') expect(serial).toBeUndefined()
        else if (serial !== undefined) signed.push({ serial, intended: (await plain.store.get('intent', serial))?.state === 'open' })
      }
      return await plain.kms.sign(batch)
    },
  }
  ctx = { ...plain, kms }
  side = { ctx, handle: deviceHandler(ctx, { policy: { requireEkCertificate: true }, reportEvery: 300 }) }
  const [factory, ekCa, idevidCa] = [station(), makeEkCa(ctx.clock.now), makeIdevidCa(ctx.clock.now)]
  await addStation(ctx, operator(), { id: factory.id, publicKey: factory.publicKey })
  await importEndorsement(ctx, operator(), { certificate: toPem('CERTIFICATE', ekCa.certificate), test: true })
  await importEndorsement(ctx, operator(), { certificate: toPem('CERTIFICATE', idevidCa.certificate), test: true, for: 'idevid' })
  await importRelease(ctx, operator(), factory.signed(referenceValues(firmware.manifest)))
  const tpm = createSoftwareTpm({ random, now: () => ctx.clock.now })
  const ek = await personalise(tpm, ekCa, { random, now: ctx.clock.now })
  const board = createBoard({ serial: 'GW-1', tpm, flash: new Flash() })
  install(board, firmware)
  board.boot()
  const client = new Tpm(board.transport(), { random })
  const made = makeElement(idevidCa, 'SE-1', ctx.clock.now)
  const rows = [{ serial: 'GW-1', ek }, { serial: 'SE-1', idevid: made.spki }, { serial: 'PL-1' }]
  await importBatch(ctx, operator(), { ...factory.signed(manifestJson({ batch: 'b1', model: 'gateway', station: factory.id }, rows)), format: 'json' })
  const [token] = await createTokens(ctx, operator(), { batch: 'b1', count: 1, life: 3_600_000 })
  boards = {
    tpm2: { serial: 'GW-1', attester: tpm2Attester(await openDeviceKeys(client, await provision(client))), eventLog: board.eventLog() },
    idevid: { serial: 'SE-1', attester: idevidAttester(await softwareKeys(), softwareSecureElement(made.key, [made.certificate])) },
    token: { serial: 'PL-1', attester: await byToken(new TextDecoder().decode(token?.text.bytes())) },
  }
})
afterEach(async () => await ctx.close())

type Name = keyof typeof boards

const enrol = async (method: Name, purpose: 'enrol' | 'return' = 'enrol'): Promise<void> =>
  expect(await attemptAt(side, { ...boards[method], purpose })).toBe('admitted')

/** A new TLS key over the device's own connection. */
const renew = async (method: Name): Promise<void> => {
  const { serial, attester } = boards[method]
  const id = DeviceId.parse(serial.toLowerCase())
  const from = ctx.bus.connect({ client: id, device: id })
  for (let turns = 0; ctx.bus.sent.every(({ client }) => client !== id); turns++) {
    expect(turns).toBeLessThan(1000)
    await new Promise((resolve) => void setTimeout(resolve, 5))
  }
  const welcome = ctx.bus
    .take(id)
    .map((bytes) => readMessage(bytes, { max }).envelope.body)
    .find((body) => body.type === 'welcome')
  if (welcome?.type !== 'welcome') throw new Error('no welcome')
  const key = newTlsKey()
  const body = {
    type: 'renew' as const,
    session: welcome.session,
    csr: await tlsCsr(key, id),
    binding: await attester.sign(tlsBinding('plant', welcome.session, key.spki)),
  }
  await side.handle(
    from,
    await signMessage({ v: 1, tenant: TenantId.parse('plant'), device: id, from: 'device', id: random(16), seq: 1, body }, attester.signer),
  )
  expect(ctx.bus.take(id).map((bytes) => readMessage(bytes, { max }).envelope.body.type)).toContain('identity')
  ctx.bus.disconnect(from)
}

/** Every way to a certificate: what was done before, the way itself, and how many certificates it gives (a return keeps the LDevID's). */
const ways: readonly (readonly [string, (() => Promise<void>)[], () => Promise<void>, number])[] = (Object.keys(methods) as Name[]).flatMap((method) => [
  [`${method}: enrolment`, [], async () => await enrol(method), 2],
  [`${method}: enrolled again`, [async () => await enrol(method)], async () => await enrol(method), 2],
  [`${method}: return with known keys`, [async () => await enrol(method)], async () => await enrol(method, 'return'), 1],
  [`${method}: renewal`, [async () => await enrol(method)], async () => await renew(method), 1],
])

describe('every certificate had its intent before it was signed, by way', () => {
  test.each(ways)('%s', async (_name, before, way, certificates) => {
    for (const step of before) await step()
    const [known, steps] = [await ctx.store.find('certificate', { limit: 1000 }), ctx.steps.length]
    signed.length = 0
    await way()
    const issued = (await ctx.store.find('certificate', { limit: 1000 })).filter(({ id }) => known.every((one) => one.id !== id))
    expect(issued).toHaveLength(certificates)
    // I6 while it happens: at each signature the row was there, open; what was signed is what was recorded, nothing else.
    expect(signed.map(({ intended }) => intended)).toEqual(issued.map(() => true))
    expect(signed.map(({ serial }) => serial).toSorted()).toEqual(issued.map(({ id }) => id).toSorted())
    for (const { id } of issued) expect((await ctx.store.get('intent', id))?.state).toBe('issued')
    // The one issuing function announces both of its steps, in this order.
    expect(ctx.steps.slice(steps).filter((step) => step.startsWith('issue.'))).toEqual(['issue.intended', 'issue.signed'])
  })

  test.each(ways)('%s: nothing is signed when the intent cannot be written', async (_name, before, way) => {
    for (const step of before) await step()
    signed.length = 0
    const { store } = ctx
    const broken: TestContext = {
      ...ctx,
      store: {
        ...store,
        commit: async (changes, options) => {
          if (changes.writes.some(({ table }) => table === 'intent')) throw new Error('the disk is full')
          return await store.commit(changes, options)
        },
      },
    }
    side = { ctx: broken, handle: deviceHandler(broken, { policy: { requireEkCertificate: true }, reportEvery: 300 }) }
    await expect(way()).rejects.toThrow()
    expect(signed).toEqual([])
  })
})

describe('there is one place that signs certificates', () => {
  const root = fileURLToPath(new URL('..', import.meta.url))
  const sources = (folder: string): string[] =>
    readdirSync(join(root, folder), { withFileTypes: true }).flatMap((entry) => {
      const path = `${folder}/${entry.name}`
      if (entry.isDirectory()) return sources(path)
      return entry.name.endsWith('.ts') && !entry.name.endsWith('.test.ts') ? [path] : []
    })
  const where = (pattern: RegExp): string[] => sources('server').filter((path) => pattern.test(readFileSync(join(root, path), 'utf8')))

  const places: readonly (readonly [string, RegExp, readonly string[]])[] = [
    // Besides the template, the check of the profiles signs what it writes with a key of its own, at every start; a sealed server signs itself, under no CA.
    ['writes a TBSCertificate', /import \{[^}]*\btbsOf\b[^}]*\}/, ['server/ca/check-profiles.ts', 'server/ca/template.ts', 'server/sealing.ts']],
    ['has one written', /import \{[^}]*\bwriteClean\b[^}]*\}/, ['server/flows/issue.ts']],
    [
      'joins it with a signature',
      /import \{[^}]*\bcertificateOf\b[^}]*\} from '[^']*\/tbs\.ts'/,
      ['server/ca/check-profiles.ts', 'server/flows/issue.ts', 'server/sealing.ts'],
    ],
    ['adds a certificate to the store', /insert\('certificate'/, ['server/flows/issue.ts']],
    [
      'asks the KMS to sign',
      /\bkms\.sign\(/,
      [
        'server/api/admin/handlers.ts',
        'server/flows/issue.ts',
        'server/flows/message.ts',
        'server/flows/ocsp.ts',
        'server/flows/status-lists.ts',
        'server/kms/process.ts',
      ],
    ],
    [
      'orders certificates',
      /\bprepareCertificates\(/,
      ['server/flows/authority.ts', 'server/flows/enrol.ts', 'server/flows/est.ts', 'server/flows/ocsp.ts', 'server/flows/renew.ts'],
    ],
  ]
  test.each(places)('%s', (_what, pattern, expected) => expect(where(pattern).toSorted()).toEqual(expected))

  test('and every method of the table leads through the same enrolment', () => {
    const flows = where(/\bmethods\b.*from '.*attestation\/methods\.ts'|\bmethodOf\b.*from '.*attestation\/methods\.ts'/)
    expect(flows.toSorted()).toEqual(['server/api/device.ts', 'server/flows/enrol.ts'])
  })
})
