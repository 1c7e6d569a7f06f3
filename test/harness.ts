import { generateKeyPairSync, randomBytes, sign, type KeyObject } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { makeCsr } from '@fleetkey/protocol/x509/csr.ts'
import { refusalCounter } from '@fleetkey/server/access/refusals.ts'
import type { Caller, Role } from '@fleetkey/server/access/caller.ts'
import type { SequencedEntry } from '@fleetkey/server/audit/entry.ts'
import type { Certificate } from '@fleetkey/server/ca/certificate.ts'
import { openAuthority } from '@fleetkey/server/flows/authority.ts'
import type { Base, Bus, Context, DeviceRef } from '@fleetkey/server/flows/context.ts'
import { defaultBudget } from '@fleetkey/server/fleet/recovery.ts'
import { liveSessions } from '@fleetkey/server/flows/sessions.ts'
import { openVault } from '@fleetkey/server/flows/vault.ts'
import { openFileKms } from '@fleetkey/server/kms/file.ts'
import { openMemoryStore } from '@fleetkey/server/store/memory.ts'

/** A bus without a broker: keeps what was sent, and lets a test be the devices. */
export interface FakeBus extends Bus {
  readonly sent: { readonly client: string; readonly bytes: Uint8Array }[]
  readonly kicked: string[]
  /** Opens a connection: presence is announced. `exporter` is random unless given. */
  connect(of: { client: string; device?: string | null; exporter?: Uint8Array | null }): DeviceRef
  disconnect(from: DeviceRef): void
  /** Takes what was sent to this client, oldest first. */
  take(client: string): Uint8Array[]
}

export const fakeBus = (): FakeBus => {
  const live = new Map<number, DeviceRef>()
  const listeners: ((from: DeviceRef, present: boolean) => void)[] = []
  const sent: { client: string; bytes: Uint8Array }[] = []
  const kicked: string[] = []
  const topics = new Map<string, Set<string>>()
  let connection = 0
  const online = (client: string): boolean => [...live.values()].some((ref) => ref.client === client)
  const disconnect = (from: DeviceRef): void => {
    if (live.delete(from.connection)) for (const listener of listeners) listener(from, false)
  }
  return {
    sent,
    kicked,
    connect({ client, device = null, exporter = randomBytes(32) }) {
      const from: DeviceRef = { client, device: device as DeviceRef['device'], from: '127.0.0.0/24', exporter, connection: ++connection }
      live.set(from.connection, from)
      for (const listener of listeners) listener(from, true)
      return from
    },
    disconnect,
    take(client) {
      const own = sent.filter((message) => message.client === client)
      for (const message of own) sent.splice(sent.indexOf(message), 1)
      return own.map(({ bytes }) => bytes)
    },
    start: async () => undefined,
    async send(client, bytes) {
      if (!online(client)) return 'offline'
      sent.push({ client, bytes })
      return 'accepted'
    },
    async publish(topic, bytes) {
      for (const client of topics.get(topic) ?? []) if (online(client)) sent.push({ client, bytes })
    },
    assign(client, allowed) {
      for (const clients of topics.values()) clients.delete(client)
      for (const topic of allowed) topics.set(topic, (topics.get(topic) ?? new Set()).add(client))
    },
    async kick(client) {
      kicked.push(client)
      for (const ref of live.values()) if (ref.client === client) disconnect(ref)
    },
    online,
    onPresence: (listener) => void listeners.push(listener),
    health: () => ({ listening: true, connections: live.size }),
    stop: async () => undefined,
  }
}

export interface TestContext extends Context {
  readonly bus: FakeBus
  /** Milliseconds since 1970; move it with `clock.now += …`. */
  readonly clock: { now: number }
  readonly steps: string[]
  readonly lines: string[]
  /** Campaigns that the clock was asked to look at. */
  readonly woken: string[]
  /** Certificates whose status changed. */
  readonly published: Certificate[]
  entries(): Promise<readonly SequencedEntry[]>
  close(): Promise<void>
}

/** A context with the memory store, a file KMS in a temporary folder, a fake bus and a clock that stands until moved. */
export const testContext = async (of: { tenant?: string; now?: number; onStep?: (name: string) => void } = {}): Promise<TestContext> => {
  const folder = mkdtempSync(join(tmpdir(), 'fleetkey-'))
  const clock = { now: of.now ?? Date.UTC(2027, 0, 1) }
  const store = openMemoryStore()
  const kms = await openFileKms(folder)
  const steps: string[] = []
  const lines: string[] = []
  const base: Base = {
    tenant: of.tenant ?? 'plant',
    store,
    kms,
    refusals: refusalCounter(),
    now: () => clock.now,
    random: (length) => new Uint8Array(randomBytes(length)),
    log: (line) => void lines.push(line),
    step: (name) => {
      steps.push(name)
      of.onStep?.(name)
    },
  }
  const authority = await openAuthority(base)
  const vault = await openVault(base, authority.kek)
  const woken: string[] = []
  const published: Certificate[] = []
  return {
    ...base,
    authority,
    vault,
    sessions: liveSessions(),
    recoveries: defaultBudget,
    wake: (campaign) => void woken.push(campaign),
    certificatesChanged: (certificates) => void published.push(...certificates),
    published,
    bus: fakeBus(),
    clock,
    steps,
    lines,
    woken,
    entries: async () => await store.audit({ after: 0, limit: 10_000 }),
    async close() {
      await kms.close()
      await store.close()
      rmSync(folder, { recursive: true, force: true })
    },
  }
}

/** An operator with these roles; an owner unless told. */
export const operator = (...roles: Role[]): Caller => ({ kind: 'operator', id: 'alice', roles: roles.length === 0 ? ['owner'] : roles, from: 'test' })

/** A factory station: signs manifests and reference values (ECDSA P-256, SHA-256, DER), and requests for a certificate. */
export const station = (
  id = 'line-1',
): {
  id: string
  publicKey: string
  spki: Uint8Array
  signed: (content: string | Uint8Array) => { content: Uint8Array; signature: Uint8Array; station: string }
  request: (subject?: string) => Promise<Uint8Array>
} => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' }) as { privateKey: KeyObject; publicKey: KeyObject }
  return {
    id,
    publicKey: publicKey.export({ format: 'pem', type: 'spki' }) as string,
    spki: new Uint8Array(publicKey.export({ format: 'der', type: 'spki' })),
    request: async (subject = id) =>
      await makeCsr({
        subject,
        spki: new Uint8Array(publicKey.export({ format: 'der', type: 'spki' })),
        sign: async (data) => sign('sha256', data, { key: privateKey, dsaEncoding: 'ieee-p1363' }),
      }),
    signed(content) {
      const bytes = typeof content === 'string' ? new TextEncoder().encode(content) : content
      return { content: bytes, signature: sign('sha256', bytes, privateKey), station: id }
    },
  }
}
