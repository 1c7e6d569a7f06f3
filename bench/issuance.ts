import { spawnSync } from 'node:child_process'
import { generateKeyPairSync, randomBytes, sign, verify } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { makeCsr } from '@fleetkey/protocol/x509/csr.ts'
import { judgeRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { refusalCounter } from '@fleetkey/server/access/refusals.ts'
import { requestPolicyOf, validityOf } from '@fleetkey/server/ca/profiles.ts'
import { certificateOf, serialOf } from '@fleetkey/server/ca/tbs.ts'
import { writeClean } from '@fleetkey/server/ca/template.ts'
import { openAuthority, type Authority } from '@fleetkey/server/flows/authority.ts'
import type { Base } from '@fleetkey/server/flows/context.ts'
import { claimSpki, prepareCertificates, recordIssued } from '@fleetkey/server/flows/issue.ts'
import { perform, type Intent } from '@fleetkey/server/flows/perform.ts'
import { openFileKms } from '@fleetkey/server/kms/file.ts'
import { systemRandom } from '@fleetkey/server/random.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { startCfssl, type CfsslRate } from './cfssl.ts'

export interface Issuance {
  /** P-256 signatures and verifications a CPU second: `openssl speed` where it is there, else node's. */
  readonly openssl: { readonly sign: number; readonly verify: number; readonly by: 'openssl speed' | 'node' }
  /** Requests a second by the clock: judged, issued, stored, audited; one process, so many at a time. */
  readonly rate: number
  /** The same a CPU second, and its parts: the judgement of a request; lint, TBS and signature where possession is proven already. */
  readonly whole: number
  readonly judged: number
  readonly issued: number
  /** `cfssl serve` beside it; undefined where it is not installed. Its ratios are to the floor of its own round. */
  readonly cfssl: { readonly kept: Peer; readonly unkept: Peer } | undefined
}

/** Another CA's rates, and the floor measured before it in the same round. */
export interface Peer extends CfsslRate {
  readonly floor: number
}

interface Request {
  readonly id: DeviceId
  readonly csr: Uint8Array
}

const makeRequests = async (count: number): Promise<readonly Request[]> => {
  const made: Request[] = []
  for (let at = 0; at < count; at++) {
    const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
    const id = DeviceId.parse(`gw-${at}`)
    const spki = new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))
    made.push({ id, csr: await makeCsr({ subject: id, spki, sign: async (data) => sign('sha256', data, { key: privateKey, dsaEncoding: 'ieee-p1363' }) }) })
  }
  return made
}

/** Calls a CPU second of this process, all threads. */
const perCpuSecond = async (count: number, work: () => Promise<void> | void): Promise<{ cpu: number; wall: number }> => {
  const [before, started] = [process.cpuUsage(), performance.now()]
  await work()
  const { user, system } = process.cpuUsage(before)
  return { cpu: (count * 1e6) / (user + system), wall: (count * 1000) / (performance.now() - started) }
}

/** Operations a CPU second, which is what `openssl speed` counts unless told otherwise. */
const opensslSpeed = async (seconds: number): Promise<Issuance['openssl']> => {
  const { stdout } = spawnSync('openssl', ['speed', '-seconds', String(seconds), 'ecdsap256'], { encoding: 'utf8' })
  const [, signs, verifies] = /256 bits ecdsa \(nistp256\)\s+\S+s\s+\S+s\s+([\d.]+)\s+([\d.]+)/.exec(stdout ?? '') ?? []
  if (signs !== undefined && verifies !== undefined) return { sign: Number(signs), verify: Number(verifies), by: 'openssl speed' }
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const [data, count] = [randomBytes(400), 5_000]
  const made = sign('sha256', data, privateKey)
  const times = async (work: () => unknown): Promise<number> => {
    const { cpu } = await perCpuSecond(count, () => {
      for (let call = 0; call < count; call++) work()
    })
    return cpu
  }
  return { sign: await times(() => sign('sha256', data, privateKey)), verify: await times(() => verify('sha256', data, publicKey, made)), by: 'node' }
}

const policyOf = (authority: Authority, id: string) => requestPolicyOf(authority.profiles['device-tls'], { tenant: 'bench', subject: id })

/** One request through everything: judged, intent durable, linted, signed, stored with its audit entries. */
const issueOne = async (ctx: Base, authority: Authority, { id, csr }: Request): Promise<void> => {
  const intent: Intent = { caller: { kind: 'device', id, from: '127.0.0.0/24' }, action: 'device.renew', subject: id }
  const { spki } = judgeRequest(csr, policyOf(authority, id))
  const [tls] = await prepareCertificates(ctx, authority, intent, [{ profile: 'device-tls', device: id, subject: id, spki }])
  if (tls === undefined) throw new Error('no certificate')
  await perform(ctx, intent, async (tx) => {
    await claimSpki(ctx, tx, tls)
    recordIssued(tx, tls)
  })
}

const signOnly = async (ctx: Base, authority: Authority, requests: readonly { readonly id: DeviceId; readonly spki: Uint8Array }[]): Promise<void> => {
  const profile = authority.profiles['device-tls']
  const now = ctx.now()
  for (let at = 0; at < requests.length; at += 64) {
    const tbs = requests.slice(at, at + 64).map(({ id, spki }) => {
      const order = { profile: 'device-tls', subject: id, spki } as const
      const of = { tenant: ctx.tenant, serial: serialOf(ctx.random(12), now), ...validityOf(profile, now) }
      return writeClean({ profile, order, issuer: authority, of, now })
    })
    const signatures = await ctx.kms.sign(tbs.map((data) => ({ key: authority.key, purpose: authority.purpose, data })))
    for (const [index, signature] of signatures.entries()) certificateOf(tbs[index] ?? new Uint8Array(), signature)
  }
}

/** Requests a CPU second if one verification and one signature were all there is to do. */
export const boundOf = ({ sign: signs, verify: verifies }: Issuance['openssl']): number => 1 / (1 / signs + 1 / verifies)

const bestOf = <T>(rounds: readonly T[], ratio: (round: T) => number): T => {
  const [best] = rounds.toSorted((one, other) => ratio(other) - ratio(one))
  if (best === undefined) throw new Error('no round was measured')
  return best
}

/** Requests that cfssl has at a time: enough to keep both cores busy. */
const inFlight = 64

/** Measures issuing with the real store, KMS and audit log; `atOnce` requests are under way together. Best of three, in turns with the floor and with cfssl. */
export const measureIssuance = async (count: number, atOnce = 256): Promise<Issuance> => {
  const folder = mkdtempSync(join(tmpdir(), 'fleetkey-bench-issuance-'))
  const step = (): void => undefined
  const now = (): number => Date.now()
  const random = systemRandom()
  const store = await openSqliteStore(join(folder, 'store'), { now, step })
  const kms = await openFileKms(join(folder, 'kms'), { now, random, step })
  const [kept, unkept] = [await startCfssl(join(folder, 'cfssl-kept'), true), await startCfssl(join(folder, 'cfssl-unkept'), false)]
  try {
    const ctx: Base = { tenant: 'bench', store, kms, refusals: refusalCounter(), now, random, log: step, step }
    const authority = await openAuthority(ctx)
    // Keys are made before anything is measured; each round has its own, for the same devices: a renewal.
    const rounds = await Promise.all(Array.from({ length: 4 }, async () => await makeRequests(count)))
    const results: Issuance[] = []
    for (const [round, requests] of rounds.entries()) {
      const openssl = await opensslSpeed(1)
      const proven = requests.map(({ id, csr }) => ({ id, spki: judgeRequest(csr, policyOf(authority, id)).spki }))
      const judged = await perCpuSecond(count, () => {
        for (const { id, csr } of requests) judgeRequest(csr, policyOf(authority, id))
      })
      const issued = await perCpuSecond(count, async () => await signOnly(ctx, authority, proven))
      const whole = await perCpuSecond(count, async () => {
        let next = 0
        const worker = async (): Promise<void> => {
          for (let one = requests[next++]; one !== undefined; one = requests[next++]) await issueOne(ctx, authority, one)
        }
        await Promise.all(Array.from({ length: atOnce }, worker))
      })
      const csrs = requests.map(({ csr }) => csr)
      const floor = boundOf(openssl)
      const cfssl = kept && unkept && { kept: { ...(await kept.sign(csrs, inFlight)), floor }, unkept: { ...(await unkept.sign(csrs, inFlight)), floor } }
      // The first round warms up.
      if (round > 0) results.push({ openssl, rate: whole.wall, whole: whole.cpu, judged: judged.cpu, issued: issued.cpu, cfssl })
    }
    const best = bestOf(results, ({ whole, openssl }) => whole / boundOf(openssl))
    const peers = results.flatMap(({ cfssl }) => (cfssl === undefined ? [] : [cfssl]))
    if (peers.length === 0) return best
    const ofPeer = (which: 'kept' | 'unkept'): Peer =>
      bestOf(
        peers.map((peer) => peer[which]),
        ({ cpu, floor }) => cpu / floor,
      )
    return { ...best, cfssl: { kept: ofPeer('kept'), unkept: ofPeer('unkept') } }
  } finally {
    await kept?.stop()
    await unkept?.stop()
    await kms.close()
    await store.close()
    rmSync(folder, { recursive: true, force: true })
  }
}
