import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { trustOfBundle, type Settings } from '@fleetkey/device-agent/config.ts'
import { softwareSecureElement } from '@fleetkey/device-agent/secure-element.ts'
import { makeEkCa } from '@fleetkey/firmware-sim/factory/ek-ca.ts'
import { personalise } from '@fleetkey/firmware-sim/factory/factory.ts'
import { makeElement, makeIdevidCa } from '@fleetkey/firmware-sim/factory/idevid-ca.ts'
import { manifestJson, type BoardRecord } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { buildRelease, referenceValues, simulatedImages, type Release } from '@fleetkey/firmware-sim/release/release.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import type { Caller } from '@fleetkey/server/access/caller.ts'
import type { Kms } from '@fleetkey/server/flows/context.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { importEndorsement } from '@fleetkey/server/flows/endorsement.ts'
import { addMembers, createGroup } from '@fleetkey/server/flows/group.ts'
import { setGroupQuery, tagDevice } from '@fleetkey/server/flows/group-query.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { importRelease } from '@fleetkey/server/flows/import-release.ts'
import { addStation, type Signed } from '@fleetkey/server/flows/station.ts'
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
  { id: KeyId.parse('telemetry'), group, protection: 'sealed', recipientUsage: 0 },
  { id: KeyId.parse('archive'), group, protection: 'sealed', recipientUsage: 600_000 },
  { id: KeyId.parse('site'), group: tagged, protection: 'sealed', recipientUsage: 0 },
] as const
/** One that is bound to the TPM: in fleets where a board has one. */
export const boundKey = { id: KeyId.parse('command-auth'), group, protection: 'tpm', recipientUsage: 0 } as const
export type FleetKey = (typeof keys)[number] | typeof boundKey

const model = 'gateway'
/** Firmware release `number` of the boards; small images are measured as large ones are. */
export const firmware = (number: number): Release =>
  buildRelease({ model, name: `${number}.0`, number }, simulatedImages(`${model}/${number}`, new TextEncoder().encode('agent'), 64))

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
  readonly keys: readonly FleetKey[]
  /** The reference values of a release as the station signs them. */
  readonly reference: (release: Release) => Signed
  /** When it came to rest, milliseconds since 1970. */
  readonly at: number
  close(): Promise<void>
}

/**
 * Sets up a server, makes boards, enrols them, and gives them their keys: through the real flows, in virtual time. `tpms`: so many of the boards, the first, have a
 * TPM and measured firmware (release 1), the others secure elements.
 */
export const makeFleet = async (size: number, tpms = 0): Promise<Fleet> => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-simulation-'))
  const kms = await openFileKms(join(folder, 'kms'))
  const close = async (): Promise<void> => {
    await kms.close()
    rmSync(folder, { recursive: true, force: true })
  }
  try {
    return { ...(await atRest(kms, size, tpms)), close }
  } catch (error) {
    await close()
    throw error
  }
}

const referenceBy =
  (line: ReturnType<typeof station>): Fleet['reference'] =>
  (release) =>
    line.signed(referenceValues(release.manifest))

/**
 * The same without its end. No function that is made in here is part of it: one would keep all of this alive, server, network and boards, as long as the fleet,
 * which is several times what the fleet is.
 */
const atRest = async (kms: Awaited<ReturnType<typeof openFileKms>>, size: number, tpms: number): Promise<Omit<Fleet, 'close'>> => {
  const time = virtualTime(Date.UTC(2027, 0, 1))
  try {
    const dice = diceOf(1)
    const lines: string[] = []
    const log = (line: string): void => void lines.push(line)
    const network = openNetwork({ time, dice })
    const store = openMemoryStore()
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
    const [ca, ekCa] = [makeIdevidCa(time.now()), makeEkCa(time.now())]
    await addStation(ctx, alice, line)
    await importEndorsement(ctx, alice, { certificate: toPem('CERTIFICATE', ca.certificate), test: true, for: 'idevid' })
    await importEndorsement(ctx, alice, { certificate: toPem('CERTIFICATE', ekCa.certificate), test: true })
    const reference = referenceBy(line)
    if (tpms > 0) await importRelease(ctx, alice, reference(firmware(1)))
    const blanks: (Blank & BoardRecord)[] = []
    for (let number = 1; number <= size; number++) {
      const serial = `B-${number}`
      if (number <= tpms) {
        const tpm = createSoftwareTpm({ random: dice.bytes, now: time.now })
        const ek = await personalise(tpm, ekCa, { random: dice.bytes, now: time.now() })
        blanks.push({ serial, ek, hardware: { tpm: tpm.state(), release: firmware(1) } })
      } else {
        const { key, spki, certificate } = makeElement(ca, serial, time.now())
        blanks.push({ serial, idevid: spki, hardware: { element: softwareSecureElement(key, [certificate]) } })
      }
    }
    const all: readonly FleetKey[] = tpms > 0 ? [...keys, boundKey] : keys
    await createGroup(ctx, alice, group)
    for (let from = 0; from < size; from += inBatch) {
      const some = blanks.slice(from, from + inBatch)
      const batch = `batch-${from / inBatch + 1}`
      const manifest = manifestJson({ batch, model, station: 'line-1' }, some)
      await importBatch(ctx, alice, { ...line.signed(manifest), format: 'json' })
      await addMembers(ctx, alice, group, { devices: some.map(({ serial }) => DeviceId.parse(serial.toLowerCase())) })
    }
    await createGroup(ctx, alice, tagged)
    for (const { serial } of blanks) await tagDevice(ctx, alice, DeviceId.parse(serial.toLowerCase()), { site: 'a' })
    await setGroupQuery(ctx, alice, tagged, 'tag.site=a')
    for (const { id, group: to, protection, recipientUsage } of all) {
      await createKey(ctx, alice, { id, protection, recipientUsage })
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
    const isAtRest = await time.run(600_000, () => {
      if (time.now() - last < 1_000) return false
      last = time.now()
      return boards.every(({ agent, hasTpm }) => all.every(({ id, protection }) => agent?.status().current[id] === 1 || (protection === 'tpm' && !hasTpm)))
    })
    // What is under way arrives.
    await time.run(60_000)
    if (!isAtRest || auditKey === null) throw new Error(`the fleet did not come to rest:\n${lines.slice(-20).join('\n')}`)
    for (const board of boards) board.cut({ keep: true })
    server.crash()
    await time.run(60_000)
    return {
      store,
      kms,
      auditKey,
      trust,
      keys: all,
      reference,
      boards: boards.map((board) => ({ blank: board.blank(), contents: board.medium.contents() })),
      at: time.now(),
    }
  } finally {
    time.end()
  }
}

/** The fleets that schedules begin with. */
export interface Fleets {
  /** All boards have secure elements. */
  readonly plain: Fleet
  /** All but the last have TPMs, which cost more; there is a key bound to them. */
  readonly measured: Fleet
  /** The one that the schedule of this seed begins with: one in seven with TPMs. */
  of(seed: number): Fleet
  close(): Promise<void>
}

export const makeFleets = async (size: number): Promise<Fleets> => {
  const [plain, measured] = [await makeFleet(size), await makeFleet(size, Math.max(size - 1, 1))]
  return {
    plain,
    measured,
    of: (seed) => (seed % 7 === 0 ? measured : plain),
    async close() {
      await plain.close()
      await measured.close()
    },
  }
}
