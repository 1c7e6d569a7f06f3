import { createHash, createPrivateKey, generateKeyPairSync, randomBytes, sign } from 'node:crypto'
import { closeSync, fdatasyncSync, openSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { inside, readBits, tags, whole } from '@fleetkey/protocol/x509/der.ts'
import { makeOcspRequest } from '@fleetkey/protocol/x509/ocsp.ts'
import type { Certificate } from '@fleetkey/server/ca/certificate.ts'
import type { EnrolledDevice } from '@fleetkey/server/fleet/device.ts'
import type { Context, Write } from '@fleetkey/server/flows/context.ts'
import { ocspResponder } from '@fleetkey/server/flows/ocsp.ts'
import { revokeDevice } from '@fleetkey/server/flows/revoke.ts'
import { listMaker } from '@fleetkey/server/api/list-maker.ts'
import { statusLists, type StatusLists } from '@fleetkey/server/flows/status-lists.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { operator, testContext } from '../test/harness.ts'

const day = 86_400_000
export const median = (values: readonly number[]): number => values.toSorted((one, other) => one - other)[values.length >> 1] ?? Number.NaN
const hex = (bytes: number): string => randomBytes(bytes).toString('hex')

/** A row as a revoked or valid certificate has it, with bytes of the usual size. */
export const certificate = (status: Certificate['status'], device: DeviceId, now: number): Certificate => ({
  id: `4${hex(16).slice(1)}`,
  version: 0,
  profile: 'device-identity',
  device,
  der: randomBytes(460),
  spkiHash: hex(32),
  notBefore: now,
  notAfter: now + 365 * day,
  status,
  revokedAt: status === 'valid' ? null : now,
  reason: status === 'valid' ? null : 'device revoked',
  ...(status === 'valid' ? {} : { code: 'keyCompromise' as const }),
})

export const enrolled = (id: DeviceId, tls: Certificate, ldevid: Certificate, now: number): EnrolledDevice => ({
  id,
  version: 0,
  serial: id.toUpperCase(),
  model: 'gateway',
  batch: 'b',
  registeredAt: now,
  lastRefusal: null,
  state: 'enrolled',
  keys: { ekHash: hex(32), ak: randomBytes(90), srk: randomBytes(90), ldevid: randomBytes(90), recipient: randomBytes(90), ldevidSpki: randomBytes(91) },
  enrolledAt: now,
  ldevidSerial: ldevid.id,
  tlsSerial: tls.id,
  previousTlsSerial: null,
  resetCount: 1,
  reportedResetCount: 1,
  release: 'gateway/1.0.0',
  floor: 1,
  assurance: 'attested',
  verdict: { verdict: 'affirming', reason: 'reference.match', detail: '', release: 'gateway/1.0.0', at: now, claims: [] },
  attestOrderedAt: null,
  lastSeenAt: now,
  agent: 'bench',
})

export const entry = {
  at: 0,
  caller: 'system:bench',
  from: 'server',
  action: 'server.setup',
  subject: 'bench',
  outcome: 'done',
  code: null,
  detail: '',
} as const

/** Milliseconds of one 8 kB write that is on the disk when it returns, median. */
const bareWrite = (folder: string): number => {
  const file = openSync(join(folder, 'bare'), 'w')
  const page = randomBytes(8192)
  const times = Array.from({ length: 100 }, () => {
    const started = performance.now()
    writeSync(file, page)
    fdatasyncSync(file)
    return performance.now() - started
  })
  closeSync(file)
  return median(times)
}

export interface RevocationFigures {
  /** Until the revocation is durable, from when on nothing of the device is accepted; and until everything that follows from it is done. */
  readonly durable: number
  readonly whole: number
  readonly floor: number
}

/** Revokes devices one by one in a durable store where `before` certificates are revoked already. Milliseconds, medians of 100. */
export const measureRevocation = async (folder: string, before: number): Promise<RevocationFigures> => {
  const memory = await testContext()
  const now = memory.now()
  const store = await openSqliteStore(join(folder, 'revocation-store'))
  let durableAt = 0
  const step = (name: string): void => {
    if (name === 'revoke.committed') durableAt = performance.now()
  }
  const ctx: Context = { ...memory, store, step }
  try {
    for (let done = 0; done < before; done += 1000) {
      const writes = Array.from({ length: Math.min(1000, before - done) }, (_, at): Write => ({
        table: 'certificate',
        do: 'insert',
        row: certificate('revoked', DeviceId.parse(`old-${done + at}`), now),
      }))
      await store.commit({ writes, entries: [entry] })
    }
    const ids = Array.from({ length: 101 }, (_, at) => DeviceId.parse(`gw-${at}`))
    for (const id of ids) {
      const [tls, ldevid] = [certificate('valid', id, now), certificate('valid', id, now)]
      const row = enrolled(id, tls, ldevid, now)
      const writes: Write[] = [
        { table: 'device', do: 'insert', row },
        { table: 'certificate', do: 'insert', row: tls },
        { table: 'certificate', do: 'insert', row: ldevid },
      ]
      await store.commit({ writes, entries: [entry] })
    }
    const times: { durable: number; whole: number }[] = []
    for (const id of ids) {
      const started = performance.now()
      await revokeDevice(ctx, operator(), id, 'keyCompromise')
      times.push({ durable: durableAt - started, whole: performance.now() - started })
    }
    return { durable: median(times.slice(1).map(({ durable }) => durable)), whole: median(times.slice(1).map(({ whole }) => whole)), floor: bareWrite(folder) }
  } finally {
    await store.close()
    await memory.close()
  }
}

export interface ListFigures {
  /** Both kinds of complete lists with their deltas, made from certificates that were never on one. */
  readonly complete: number
  /** The same once more, when nothing but a hundred certificates has changed. */
  readonly again: number
  /** A delta with a hundred certificates. */
  readonly delta: number
  /** What of `complete` is hashing its bytes and signing as many lists. */
  readonly floor: number
  readonly bytes: number
}

const timed = async (work: () => Promise<void>): Promise<number> => {
  const started = performance.now()
  await work()
  return performance.now() - started
}

/** Makes the lists of `entries` revoked certificates. Milliseconds, medians of 3. */
export const measureLists = async (entries: number): Promise<ListFigures> => {
  const rounds: ListFigures[] = []
  for (let round = 0; round < 3; round++) {
    const ctx = await testContext()
    try {
      const device = DeviceId.parse('gw-1')
      const rows = Array.from({ length: entries }, () => certificate('revoked', device, ctx.now()))
      const more = (): Certificate[] => Array.from({ length: 100 }, () => certificate('revoked', device, ctx.now()))
      const lists: StatusLists = statusLists(ctx, 'http://crl.test/crl/', listMaker)
      await lists.publish()
      const complete = await timed(async () => {
        lists.changed(rows)
        await lists.publish({ complete: true })
      })
      const delta = await timed(async () => {
        lists.changed(more())
        await lists.publish()
      })
      const again = await timed(async () => await lists.publish({ complete: true }))
      const whole = lists.get('issuing.crl')?.bytes ?? new Uint8Array(0)
      const key = createPrivateKey(generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).privateKey.export({ type: 'pkcs8', format: 'pem' }))
      const floor = await timed(async () => {
        // All entries stand on the whole list and once more on those of the points; each has a delta, and so has the root.
        for (let count = 0; count < 2; count++) createHash('sha256').update(whole).digest()
        for (let count = 0; count < 36; count++) sign('sha256', Buffer.alloc(200), key)
      })
      await lists.close()
      rounds.push({ complete, again, delta, floor, bytes: whole.length })
    } finally {
      await ctx.close()
    }
  }
  const of = (field: keyof ListFigures): number => median(rounds.map((round) => round[field]))
  return { complete: of('complete'), again: of('again'), delta: of('delta'), floor: of('floor'), bytes: of('bytes') }
}

export interface AnswerFigures {
  /** Answers a second by the clock: made ahead, and signed for who asks because of a nonce. */
  readonly ahead: number
  readonly signed: number
  /** Bare signatures a second. */
  readonly floor: number
}

/** OCSP about a thousand certificates in a durable store, one request after the other, keys in this process. Medians of 5. */
export const measureAnswers = async (folder: string): Promise<AnswerFigures> => {
  const memory = await testContext()
  const store = await openSqliteStore(join(folder, 'ocsp-store'))
  const ctx: Context = { ...memory, store }
  try {
    const device = DeviceId.parse('gw-1')
    const rows = Array.from({ length: 1000 }, () => certificate('valid', device, ctx.now()))
    await store.commit({ writes: rows.map((row): Write => ({ table: 'certificate', do: 'insert', row })), entries: [entry] })
    const { subject, spki } = ctx.authority
    const fields = inside(whole(spki, tags.sequence))
    fields.next(tags.sequence)
    const sha1 = (bytes: Uint8Array): Uint8Array => createHash('sha1').update(bytes).digest()
    const names = { hash: 'sha1', issuerNameHash: sha1(subject), issuerKeyHash: sha1(readBits(fields.next(tags.bitString))) } as const
    const responder = ocspResponder(ctx)
    const answers = async (nonce: () => { readonly nonce?: Uint8Array }): Promise<number> => {
      const requests = rows.map(({ id }) => makeOcspRequest({ ...names, serial: Buffer.from(id, 'hex'), ...nonce() }))
      const started = performance.now()
      for (const request of requests) {
        // Time goes on, so that nobody is told to come later.
        memory.clock.now += 10
        if ((await responder.answer(request)).bytes.length < 100) throw new Error('no answer')
      }
      return (requests.length / (performance.now() - started)) * 1000
    }
    await answers(() => ({}))
    const key = generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).privateKey
    const rounds: AnswerFigures[] = []
    for (let round = 0; round < 5; round++) {
      const [ahead, signed] = [await answers(() => ({})), await answers(() => ({ nonce: randomBytes(16) }))]
      const started = performance.now()
      for (let count = 0; count < 1000; count++) sign('sha256', randomBytes(200), key)
      rounds.push({ ahead, signed, floor: 1_000_000 / (performance.now() - started) })
    }
    const of = (field: keyof AnswerFigures): number => median(rounds.map((round) => round[field]))
    return { ahead: of('ahead'), signed: of('signed'), floor: of('floor') }
  } finally {
    await store.close()
    await memory.close()
  }
}
