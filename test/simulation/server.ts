import { Problem } from '@fleetkey/protocol/problem.ts'
import { refusalCounter } from '@fleetkey/server/access/refusals.ts'
import { clock } from '@fleetkey/server/api/clock.ts'
import { deviceHandler } from '@fleetkey/server/api/device.ts'
import { defaultBudget } from '@fleetkey/server/fleet/recovery.ts'
import { approveReleases } from '@fleetkey/server/flows/approvals.ts'
import { openAuthority } from '@fleetkey/server/flows/authority.ts'
import { admitConnection } from '@fleetkey/server/flows/connect.ts'
import type { Base, Context, Kms, Store } from '@fleetkey/server/flows/context.ts'
import { sweepEnrolments } from '@fleetkey/server/flows/enrol.ts'
import { sweepIntents } from '@fleetkey/server/flows/issue.ts'
import { settleAll } from '@fleetkey/server/flows/settle.ts'
import { liveSessions } from '@fleetkey/server/flows/sessions.ts'
import { openVault } from '@fleetkey/server/flows/vault.ts'
import type { Network } from './network.ts'
import type { VirtualTime } from './time.ts'

export const tenant = 'plant'

/** A server of the simulated world: every flow is the real one; store, network and time are not. */
export interface SimulatedServer {
  readonly ctx: Context
  /** The power goes: nothing that runs writes, sends or answers any more. */
  crash(): void
}

/** The process that did this is gone. */
export class Crashed extends Error {
  override readonly name = 'Crashed'
}

/** What the store of one process does once that process is gone, or while its disk is full. */
const gated = (store: Store, state: { readonly isDead: () => boolean; readonly isFull: () => boolean }): Store => {
  const alive = (): void => {
    if (state.isDead()) throw new Problem('unavailable', 'this process is gone')
  }
  return {
    get: async (...args) => (alive(), await store.get(...args)),
    find: async (...args) => (alive(), await store.find(...args)),
    scan: async (...args) => (alive(), await store.scan(...args)),
    tally: async (...args) => (alive(), await store.tally(...args)),
    count: async (...args) => (alive(), await store.count(...args)),
    async commit(changes, options) {
      alive()
      if (state.isFull() && options?.reserved !== true) throw new Problem('unavailable', 'the disk is full', { reason: 'store.full' })
      return await store.commit(changes, options)
    },
    audit: async (query) => (alive(), await store.audit(query)),
    checkpoint: async () => (alive(), await store.checkpoint()),
    health: () => store.health(),
    close: async () => undefined,
  }
}

/**
 * Starts a server as its own process does: finishes what the last one has left, then listens. `step` is told of every durable step and may crash it there by
 * throwing. Rejects when it crashed on the way.
 */
export const startSimulatedServer = async (of: {
  readonly store: Store
  readonly kms: Kms
  readonly network: Network
  readonly time: VirtualTime
  readonly random: (length: number) => Uint8Array
  readonly log: (line: string) => void
  readonly step: (name: string) => void
  readonly isFull: () => boolean
  /** Called before anything that may crash. */
  readonly begun: (crash: () => void) => void
}): Promise<SimulatedServer> => {
  let isDead = false
  const bell = clock()
  let ticking: { stop(): Promise<void> } | undefined
  const crash = (): void => {
    isDead = true
    of.network.crash()
    void ticking?.stop()
  }
  of.begun(crash)
  const store = gated(of.store, { isDead: () => isDead, isFull: of.isFull })
  const base: Base = {
    tenant,
    store,
    kms: of.kms,
    refusals: refusalCounter(),
    now: of.time.now,
    random: of.random,
    log: (line) => {
      if (!isDead) of.log(line)
    },
    step: (name) => {
      if (isDead) throw new Crashed(name)
      of.step(name)
    },
  }
  await sweepIntents(base)
  const authority = await openAuthority(base)
  const vault = await openVault(base, authority.kek)
  const bus = of.network.attach(async (connect) => await admitConnection(ctx, connect))
  const ctx: Context = {
    ...base,
    authority,
    vault,
    bus,
    sessions: liveSessions(),
    recoveries: defaultBudget,
    wake: bell.wake,
    certificatesChanged: () => undefined,
  }
  await sweepEnrolments(ctx)
  await approveReleases(ctx)
  await bus.start(deviceHandler(ctx, { policy: { requireEkCertificate: false }, reportEvery: 300 }))
  await settleAll(ctx)
  ticking = bell.start(ctx)
  if (isDead) {
    void ticking.stop()
    throw new Crashed('while it started')
  }
  return { ctx, crash }
}
