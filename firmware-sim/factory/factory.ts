import { createPublicKey, generateKeyPairSync, type KeyObject } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { ekCertificateIndex, handle } from '@fleetkey/tpm2/constants.ts'
import { spkiOf } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { createBoard, install, type Board } from '../board/board.ts'
import { Flash } from '../board/flash.ts'
import { buildRelease, referenceValues, simulatedImages, stages, type Images, type Release, type ReleaseManifest } from '../release/release.ts'
import { createSoftwareTpm, type SoftwareTpm } from '../tpm/software-tpm.ts'
import { ekCertificate, makeEkCa, type EkCa } from './ek-ca.ts'
import { detachedSignature, manifestCsv, manifestJson, type BoardRecord } from './manifest.ts'

type Random = (length: number) => Uint8Array

export interface BatchOrder {
  readonly batch: string
  readonly model: string
  readonly station: string
  readonly devices: number
  readonly release: { readonly name: string; readonly number: number }
}

/** What a factory has made: TPMs with EK certificates, the release they leave with, and who signs. */
export interface Batch {
  readonly order: BatchOrder
  readonly ca: EkCa
  readonly station: KeyObject
  readonly release: Release
  readonly boards: readonly (BoardRecord & { readonly tpm: SoftwareTpm })[]
}

const serialOf = (order: BatchOrder, number: number): string => `${order.model}-${order.batch}-${String(number).padStart(4, '0')}`.toUpperCase()

/** Gives a new TPM its EK certificate (NV index of the P-256 EK, TCG EK credential profile §2.2.1.4) and reads its EK. TPMT_PUBLIC. */
export const personalise = async (tpm: SoftwareTpm, ca: EkCa, around: { random: Random; now: number }): Promise<Uint8Array> => {
  const client = new Tpm(tpm.transport(), { random: around.random })
  const ek = await client.createPrimary(handle.endorsement, templates.ekEcc)
  await client.flush(ek.handle)
  tpm.writeNv(ekCertificateIndex.ecc, ekCertificate(ca, spkiOf(ek.public), around.now))
  // It leaves the line switched off in order: after a power cut its clock would not count as safe at its first boot in the field.
  await client.shutdown()
  return ek.public
}

/** The agent's own source is the last boot stage: what runs is what is measured. */
const agentPackage = (): Uint8Array => readFileSync(new URL('../../device-agent/agent.ts', import.meta.url))

/** Makes a batch. `progress` is told how many boards are done. */
export const makeBatch = async (
  order: BatchOrder,
  around: { readonly random: Random; readonly now: () => number; readonly progress?: (done: number) => void },
): Promise<Batch> => {
  const now = around.now()
  const ca = makeEkCa(now)
  const station = generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).privateKey
  const { name, number } = order.release
  const release = buildRelease({ model: order.model, name, number }, simulatedImages(`${order.model}/${name}`, agentPackage()))
  const boards: Batch['boards'][number][] = []
  for (let index = 1; index <= order.devices; index++) {
    const tpm = createSoftwareTpm({ random: around.random, now: around.now })
    boards.push({ serial: serialOf(order, index), ek: await personalise(tpm, ca, { random: around.random, now }), tpm })
    around.progress?.(index)
  }
  return { order, ca, station, release, boards }
}

const files = { batch: 'batch.json', csv: 'batch.csv', release: 'release.json', station: 'station.pem', ekCa: 'ek-ca.pem', firmware: 'firmware.json' } as const

/** Writes a batch to a new folder: what goes to the server (signed manifest and reference values, public keys) and what stays (keys, boards, images). */
export const writeBatch = async (folder: string, of: Batch): Promise<void> => {
  const { order, station, release, ca } = of
  await mkdir(join(folder, 'boards'), { recursive: true, mode: 0o700 })
  await mkdir(join(folder, 'images'), { recursive: true })
  const secret = { mode: 0o600, flag: 'wx' } as const
  const key = (of: KeyObject): string => of.export({ format: 'pem', type: 'pkcs8' }) as string
  const signed = async (name: string, content: string): Promise<void> => {
    await writeFile(join(folder, name), content, { flag: 'wx' })
    await writeFile(join(folder, `${name}.sig`), detachedSignature(content, station), { flag: 'wx' })
  }
  await writeFile(join(folder, 'station.key'), key(station), secret)
  await writeFile(join(folder, 'ek-ca.key'), key(ca.key), secret)
  await writeFile(join(folder, files.station), createPublicKey(station).export({ format: 'pem', type: 'spki' }))
  await writeFile(join(folder, files.ekCa), toPem('CERTIFICATE', ca.certificate))
  await signed(files.batch, manifestJson(order, of.boards))
  await signed(files.csv, manifestCsv(order, of.boards))
  await signed(files.release, referenceValues(release.manifest))
  await writeFile(join(folder, files.firmware), `${JSON.stringify(release.manifest, null, 2)}\n`)
  for (const { stage } of stages) await writeFile(join(folder, 'images', `${stage}.bin`), release.images[stage])
  for (const { serial, tpm } of of.boards) await writeFile(join(folder, 'boards', `${serial}.tpm`), tpm.state(), secret)
}

/** A folder that `writeBatch` made. */
export interface FactoryFolder {
  readonly serials: readonly string[]
  readonly release: Release
  /** The board with its TPM as it was last, its flash as it left the factory. `save` is handed the TPM's state after each change. */
  board(
    serial: string,
    around: { readonly random: Random; readonly now: () => number; readonly save?: (state: Uint8Array) => void; readonly state?: Uint8Array | undefined },
  ): Promise<Board>
}

/** Opens a factory's folder. Throws when a part is missing. */
export const openFactory = async (folder: string): Promise<FactoryFolder> => {
  const text = async (name: string): Promise<string> => await readFile(join(folder, name), 'utf8')
  const { rows } = JSON.parse(await text(files.batch)) as { rows: readonly { serial: string }[] }
  const manifest = JSON.parse(await text(files.firmware)) as ReleaseManifest
  const images = Object.fromEntries(
    await Promise.all(stages.map(async ({ stage }) => [stage, new Uint8Array(await readFile(join(folder, 'images', `${stage}.bin`)))] as const)),
  ) as unknown as Images
  const release: Release = { manifest, images }
  return {
    serials: rows.map(({ serial }) => serial),
    release,
    async board(serial, { random, now, save, state }) {
      const tpm = createSoftwareTpm({
        state: state ?? new Uint8Array(await readFile(join(folder, 'boards', `${serial}.tpm`))),
        random,
        now,
        ...(save === undefined ? {} : { save }),
      })
      const board = createBoard({ serial, tpm, flash: new Flash() })
      install(board, release)
      return board
    },
  }
}
