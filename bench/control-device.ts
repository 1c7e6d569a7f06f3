import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import type { Settings } from '@fleetkey/device-agent/config.ts'
import { trustOfBundle } from '@fleetkey/device-agent/config.ts'
import { openChannel } from '@fleetkey/device-agent/channel.ts'
import { openConnection } from '@fleetkey/device-agent/connection.ts'
import { openDeviceClock } from '@fleetkey/device-agent/device-clock.ts'
import { openDocument } from '@fleetkey/device-agent/files.ts'
import { openTpmHolder } from '@fleetkey/device-agent/holder.ts'
import { openTrust } from '@fleetkey/device-agent/trust.ts'
import { simulatedFiles } from '@fleetkey/firmware-sim/board/files.ts'
import { makeBatch, openFactory, writeBatch } from '@fleetkey/firmware-sim/factory/factory.ts'
import { admitBatch } from '@fleetkey/firmware-sim/fleet/admission.ts'
import { openFleet } from '@fleetkey/firmware-sim/fleet/fleet.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { deviceTopic } from '@fleetkey/protocol/topics.ts'
import { around } from './around.ts'
import { until, type ServerProcess } from './server.ts'

/** One device that has nothing to do with the fleet: it reports, and each report is answered once it was heard (PUBACK). */
export interface ControlDevice {
  /** Reports six times a second until `done` resolves; how long each took, milliseconds. */
  reports(done: Promise<unknown>): Promise<readonly number[]>
  /** So many reports, one after the other: few enough not to be slowed down. */
  burst(count: number): Promise<void>
  stop(): Promise<void>
}

export const percentile = (times: readonly number[], share: number): number =>
  times.toSorted((one, other) => one - other)[Math.min(times.length - 1, Math.floor(times.length * share))] ?? Number.NaN

/** Enrols a board of its own by the real agent, then speaks for it in the agent's stead: the agent reports every five minutes only. No session ticket given before is taken after it. */
export const openControlDevice = async (folder: string, server: ServerProcess): Promise<ControlDevice> => {
  const factory = join(folder, 'control-factory')
  await writeBatch(
    factory,
    await makeBatch({ batch: 'control', model: 'control', station: 'line-2', devices: 1, release: { name: '1.0.0', number: 1 } }, around),
  )
  await admitBatch(server.client, factory, undefined)
  const opened = await openFactory(factory)
  const [serial = ''] = opened.serials
  const board = await opened.board(serial, around)
  const trustSettings = trustOfBundle(await server.client.call('bundle'))
  const data = join(folder, 'control')
  mkdirSync(data, { recursive: true })
  const fleet = openFleet(
    {
      factory: { ...opened, board: async () => board },
      trust: trustSettings,
      data,
      files: simulatedFiles,
      ...around,
      log: () => undefined,
      tampered: new Map(),
      claims: new Map(),
      starting: 1,
    },
    () => undefined,
  )
  await fleet.on([serial])
  await until(() => fleet.status().get(serial)?.connected === true)
  await fleet.stop()

  const settings: Settings = { ...trustSettings, tpm: 'in-process', data: join(data, serial, 'agent'), serial, eventLog: null, socket: null, outputs: [] }
  const quiet = { step: () => undefined, log: () => undefined }
  const holder = await openTpmHolder({
    settings,
    files: simulatedFiles,
    document: (name) => openDocument({ files: simulatedFiles, folder: settings.data, name, step: quiet.step }),
    random: around.random,
    ...quiet,
    transport: board.transport(),
    recipientFor: async () => await Promise.reject(new Error('no new recipient key')),
  })
  const identity = await holder.vault.identities.load()
  if (identity === undefined) throw new Error('the control device has no identity')
  const device = DeviceId.parse(identity.device)
  // A suspension throws the key of all tickets away. This device is in no group: nothing else comes of it.
  await server.client.call('device.suspend', { params: { id: device }, body: { reason: 'before a storm' } })
  await server.client.call('device.reinstate', { params: { id: device } })
  const base = openTrust(settings.trust)
  const trust = base.with(identity)
  const clock = openDeviceClock({ wall: around.now, monotonic: () => performance.now(), born: Math.max(...base.roots.map(({ notBefore }) => notBefore)) })
  const welcomed = Promise.withResolvers<BodyOf<'welcome'>>()
  let refused: string | undefined
  const early: Uint8Array[] = []
  let hear = (bytes: Uint8Array): void => void early.push(bytes)
  const connection = await openConnection({
    server: settings.server,
    tenant: settings.tenant,
    trust,
    time: clock.belief(),
    client: device,
    credentials: { key: identity.tlsKey.private, certificates: [identity.tls, ...identity.chain], sign: holder.attester.sign },
    topics: { up: deviceTopic(device, 'up'), down: deviceTopic(device, 'down') },
    onMessage: (bytes) => hear(bytes),
    onClose: () => undefined,
  })
  const channel = openChannel({
    client: device,
    tenant: settings.tenant,
    signer: holder.attester.signer,
    trust: () => trust,
    random: around.random,
    clock,
    transmit: connection.send,
  })
  hear = (bytes) => {
    const body = channel.receive(bytes)?.envelope.body
    if (body?.type === 'welcome') welcomed.resolve(body)
    if (body?.type === 'refusal') refused = body.code
  }
  for (const bytes of early) hear(bytes)
  const { session } = await welcomed.promise
  const resetCount = await holder.attester.resetCount()
  let sequence = 0
  const report = async (): Promise<number> => {
    const started = performance.now()
    await channel.send({
      type: 'report',
      session,
      sequence: sequence++,
      holdings: [],
      usage: [],
      places: [],
      resetCount,
      tlsNotAfter: 0,
      trust: null,
      agent: 'bench',
    })
    if (refused !== undefined) throw new Error(`the control device's report was refused: ${refused}`)
    return performance.now() - started
  }
  return {
    async reports(done) {
      let over = false
      const end = done.finally(() => (over = true)).catch(() => undefined)
      const times: number[] = []
      while (!over) {
        times.push(await report())
        await Promise.race([end, new Promise((resolve) => void setTimeout(resolve, 150))])
      }
      return times
    },
    async burst(count) {
      for (let done = 0; done < count; done++) await report()
    },
    async stop() {
      await connection.close()
      holder.destroy()
    },
  }
}
