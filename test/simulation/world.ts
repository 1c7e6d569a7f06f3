import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { trustOfBundle, type Settings } from '@fleetkey/device-agent/config.ts'
import { softwareSecureElement } from '@fleetkey/device-agent/secure-element.ts'
import { makeElement, makeIdevidCa } from '@fleetkey/firmware-sim/factory/idevid-ca.ts'
import { manifestJson } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import type { Caller } from '@fleetkey/server/access/caller.ts'
import type { Kms } from '@fleetkey/server/flows/context.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { importEndorsement } from '@fleetkey/server/flows/endorsement.ts'
import { addMembers, createGroup } from '@fleetkey/server/flows/group.ts'
import { setGroupQuery, tagDevice } from '@fleetkey/server/flows/group-query.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { addStation } from '@fleetkey/server/flows/station.ts'
import { openFileKms } from '@fleetkey/server/kms/file.ts'
import { openMemoryStore, type MemoryStore } from '@fleetkey/server/store/memory.ts'
import { station } from '../harness.ts'
import { openBoard, type Blank } from './board.ts'
import { diceOf } from './dice.ts'
import { openNetwork } from './network.ts'
import { startSimulatedServer, tenant } from './server.ts'
import { virtualTime } from './time.ts'

export const alice: Caller = { kind: 'operator', id: 'alice', roles: ['owner'], from: 'simulation' }
export const group = GroupId.parse('plant')
/** Follows what is written on the devices: whoever stands at site a is in it. */
export const tagged = GroupId.parse('site-a')
/** Keys, the group that each is for, and how long their old epochs may still be read. */
export const keys = [
  { id: KeyId.parse('telemetry'), group, recipientUsage: 0 },
  { id: KeyId.parse('archive'), group, recipientUsage: 600_000 },
  { id: KeyId.parse('site'), group: tagged, recipientUsage: 0 },
] as const

/** Boards of one manifest. */
const inBatch = 500

/** A fleet at rest: enrolled, members of one group, with its keys in use. Every schedule begins with a copy of it. */
export interface Fleet {
  readonly store: MemoryStore
  /** One for all copies: it only keeps keys, and counts. */
  readonly kms: Kms
  readonly auditKey: Uint8Array
  readonly trust: Pick<Settings, 'server' | 'tenant' | 'trust'>
  readonly boards: readonly { readonly blank: Blank; readonly contents: ReadonlyMap<string, Uint8Array> }[]
  /** When it came to rest, milliseconds since 1970. */
  readonly at: number
  close(): Promise<void>
}

/** Sets up a server, makes boards with secure elements, enrols them, and gives them their keys: through the real flows, in virtual time. */
export const makeFleet = async (size: number): Promise<Fleet> => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-simulation-'))
  const time = virtualTime(Date.UTC(2027, 0, 1))
  try {
    const dice = diceOf(1)
    const lines: string[] = []
    const log = (line: string): void => void lines.push(line)
    const network = openNetwork({ time, dice })
    const store = openMemoryStore()
    const kms = await openFileKms(join(folder, 'kms'))
    const server = await startSimulatedServer({
      store,
      kms,
      network,
      time,
      log,
      random: dice.bytes,
      step: () => undefined,
      isFull: () => false,
      begun: () => undefined,
    })
    const { ctx } = server
    const auditKey = (await kms.create('audit-signing', 'audit-signing')).spki
    const line = station('line-1')
    const ca = makeIdevidCa(time.now())
    await addStation(ctx, alice, line)
    await importEndorsement(ctx, alice, { certificate: toPem('CERTIFICATE', ca.certificate), test: true, for: 'idevid' })
    const blanks = Array.from({ length: size }, (_, at): Blank & { readonly idevid: Uint8Array } => {
      const serial = `B-${at + 1}`
      const { key, spki, certificate } = makeElement(ca, serial, time.now())
      return { serial, idevid: spki, element: softwareSecureElement(key, [certificate]) }
    })
    await createGroup(ctx, alice, group)
    for (let from = 0; from < size; from += inBatch) {
      const some = blanks.slice(from, from + inBatch)
      const batch = `batch-${from / inBatch + 1}`
      const manifest = manifestJson({ batch, model: 'gateway', station: 'line-1' }, some)
      await importBatch(ctx, alice, { ...line.signed(manifest), format: 'json' })
      await addMembers(ctx, alice, group, { devices: some.map(({ serial }) => DeviceId.parse(serial.toLowerCase())) })
    }
    await createGroup(ctx, alice, tagged)
    for (const { serial } of blanks) await tagDevice(ctx, alice, DeviceId.parse(serial.toLowerCase()), { site: 'a' })
    await setGroupQuery(ctx, alice, tagged, 'tag.site=a')
    for (const { id, group: to, recipientUsage } of keys) {
      await createKey(ctx, alice, { id, protection: 'sealed', recipientUsage })
      await grantKey(ctx, alice, id, to)
    }
    const { authority } = ctx
    const trust = trustOfBundle({
      server: 'mqtts://server.test:8883',
      tenant,
      trust: [toPem('CERTIFICATE', authority.root)],
      chain: [toPem('CERTIFICATE', authority.issuing)],
      keys: Object.values(authority.roles).map(({ certificate }) => toPem('CERTIFICATE', certificate)),
    })
    const boards = blanks.map((blank) => openBoard({ blank, trust, network, time, dice, log, inUse: () => undefined }))
    for (const board of boards) board.switchOn()
    // Asked once a second: with thousands of boards each answer takes its time.
    let last = 0
    const atRest = await time.run(600_000, () => {
      if (time.now() - last < 1_000) return false
      last = time.now()
      return boards.every(({ agent }) => keys.every(({ id }) => agent?.status().current[id] === 1))
    })
    // What is under way arrives.
    await time.run(60_000)
    if (!atRest || auditKey === null) throw new Error(`the fleet did not come to rest:\n${lines.slice(-20).join('\n')}`)
    for (const board of boards) board.cut({ keep: true })
    server.crash()
    await time.run(60_000)
    return {
      store,
      kms,
      auditKey,
      trust,
      boards: boards.map((board, at) => ({ blank: blanks[at] as Blank, contents: board.medium.contents() })),
      at: time.now(),
      async close() {
        await kms.close()
        rmSync(folder, { recursive: true, force: true })
      },
    }
  } finally {
    time.end()
  }
}
