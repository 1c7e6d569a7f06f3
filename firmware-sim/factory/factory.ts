import { createPrivateKey, createPublicKey, generateKeyPairSync, sign, type KeyObject } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { nodeFileSystem } from '@fleetkey/device-agent/filesystem.ts'
import { softwareSecureElement, type SecureElement } from '@fleetkey/device-agent/secure-element.ts'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { makeCsr } from '@fleetkey/protocol/x509/csr.ts'
import { fromPem, toPem } from '@fleetkey/protocol/x509/pem.ts'
import { ekCertificateIndex, handle } from '@fleetkey/tpm2/constants.ts'
import { spkiOf } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { createBoard, install, type Board } from '../board/board.ts'
import { Flash } from '../board/flash.ts'
import { buildRelease, referenceValues, simulatedImages, stages, type Images, type Release, type ReleaseManifest } from '../release/release.ts'
import { createSoftwareTpm, type SoftwareTpm } from '../tpm/software-tpm.ts'
import { ekCertificate, makeEkCa, type EkCa } from './ek-ca.ts'
import type { MakerCa } from './certificate.ts'
import { makeElement, makeIdevidCa, type MadeElement } from './idevid-ca.ts'
import { detachedSignature, manifestCsv, manifestJson, type BoardRecord } from './manifest.ts'

type Random = (length: number) => Uint8Array

/** What the boards of a batch can prove: by a TPM, by the factory identity of a secure element, or nothing, so that a token has to let them in. */
export type BoardMethod = 'tpm2' | 'idevid' | 'token'
export const boardMethods: readonly BoardMethod[] = ['tpm2', 'idevid', 'token']

export interface BatchOrder {
  readonly batch: string
  readonly model: string
  readonly station: string
  readonly devices: number
  readonly release: { readonly name: string; readonly number: number }
  /** A TPM unless told. */
  readonly method?: BoardMethod
}

/** One board as it leaves the line: with a TPM, with a secure element, or with neither. */
export interface MadeBoard extends BoardRecord {
  readonly tpm?: SoftwareTpm
  readonly element?: MadeElement
}

/** What a factory has made: boards, the release they leave with, and who signs. `ca`: who vouches for their hardware; nobody does for boards that need a token. */
export interface Batch {
  readonly order: BatchOrder
  readonly ca: MakerCa
  readonly station: KeyObject
  readonly release: Release
  readonly boards: readonly MadeBoard[]
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

interface Line {
  readonly ca: MakerCa
  readonly random: Random
  readonly now: () => number
}

/** How one board is made, by what it can prove. */
const make: Readonly<Record<BoardMethod, (serial: string, line: Line) => Promise<MadeBoard>>> = {
  async tpm2(serial, { ca, random, now }) {
    const tpm = createSoftwareTpm({ random, now })
    return { serial, ek: await personalise(tpm, ca, { random, now: now() }), tpm }
  },
  async idevid(serial, { ca, now }) {
    const element = makeElement(ca, serial, now())
    return { serial, idevid: element.spki, element }
  },
  token: async (serial) => ({ serial }),
}

/** Makes a batch. `progress` is told how many boards are done. */
export const makeBatch = async (
  order: BatchOrder,
  around: { readonly random: Random; readonly now: () => number; readonly progress?: (done: number) => void },
): Promise<Batch> => {
  const now = around.now()
  const method = order.method ?? 'tpm2'
  const ca = method === 'idevid' ? makeIdevidCa(now) : makeEkCa(now)
  const station = generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).privateKey
  const { name, number } = order.release
  const release = buildRelease({ model: order.model, name, number }, simulatedImages(`${order.model}/${name}`, agentPackage()))
  const boards: Batch['boards'][number][] = []
  for (let index = 1; index <= order.devices; index++) {
    boards.push(await make[method](serialOf(order, index), { ca, random: around.random, now: around.now }))
    around.progress?.(index)
  }
  return { order, ca, station, release, boards }
}

const files = {
  batch: 'batch.json',
  csv: 'batch.csv',
  release: 'release.json',
  station: 'station.pem',
  request: 'station.csr',
  firmware: 'firmware.json',
} as const
/** Names of the files of the CA that vouches, by what the boards can prove. */
const caName = { tpm2: 'ek-ca', idevid: 'idevid-ca', token: null } as const satisfies Readonly<Record<BoardMethod, string | null>>

/** A certification request for the key of a station. */
const stationRequest = async (name: string, key: KeyObject): Promise<Uint8Array> =>
  await makeCsr({
    subject: name,
    spki: new Uint8Array(createPublicKey(key).export({ format: 'der', type: 'spki' })),
    sign: async (data) => new Uint8Array(sign('sha256', data, { key, dsaEncoding: 'ieee-p1363' })),
  })

/** Writes a batch to a new folder: what goes to the server (signed manifest and reference values, public keys) and what stays (keys, boards, images). */
export const writeBatch = async (folder: string, of: Batch): Promise<void> => {
  const { order, station, release, ca } = of
  await nodeFileSystem.makeFolder(join(folder, 'boards'), 0o700)
  await nodeFileSystem.makeFolder(join(folder, 'images'), 0o755)
  const secret = { mode: 0o600, flag: 'wx' } as const
  const key = (of: KeyObject): string => of.export({ format: 'pem', type: 'pkcs8' }) as string
  const signed = async (name: string, content: string): Promise<void> => {
    await writeFile(join(folder, name), content, { flag: 'wx' })
    await writeFile(join(folder, `${name}.sig`), detachedSignature(content, station), { flag: 'wx' })
  }
  await writeFile(join(folder, 'station.key'), key(station), secret)
  await writeFile(join(folder, files.station), createPublicKey(station).export({ format: 'pem', type: 'spki' }))
  await writeFile(join(folder, files.request), toPem('CERTIFICATE REQUEST', await stationRequest(order.station, station)))
  const vouching = caName[order.method ?? 'tpm2']
  if (vouching !== null) {
    await writeFile(join(folder, `${vouching}.key`), key(ca.key), secret)
    await writeFile(join(folder, `${vouching}.pem`), toPem('CERTIFICATE', ca.certificate))
  }
  await signed(files.batch, manifestJson(order, of.boards))
  await signed(files.csv, manifestCsv(order, of.boards))
  await signed(files.release, referenceValues(release.manifest))
  await writeFile(join(folder, files.firmware), `${JSON.stringify(release.manifest, null, 2)}\n`)
  for (const { stage } of stages) await writeFile(join(folder, 'images', `${stage}.bin`), release.images[stage])
  for (const { serial, tpm, element } of of.boards) {
    if (tpm !== undefined) await writeFile(join(folder, 'boards', `${serial}.tpm`), tpm.state(), secret)
    if (element !== undefined)
      await writeFile(join(folder, 'boards', `${serial}.idevid`), `${key(element.key)}${toPem('CERTIFICATE', element.certificate)}`, secret)
  }
}

/** A folder that `writeBatch` made. */
export interface FactoryFolder {
  readonly serials: readonly string[]
  readonly release: Release
  /** What this board can prove. */
  methodOf(serial: string): BoardMethod
  /** The secure element of a board that has one. */
  element(serial: string): Promise<SecureElement>
  /** The board with its TPM as it was last, its flash as it left the factory. `save` is handed the TPM's state after each change. */
  board(
    serial: string,
    around: { readonly random: Random; readonly now: () => number; readonly save?: (state: Uint8Array) => void; readonly state?: Uint8Array | undefined },
  ): Promise<Board>
}

/** Opens a factory's folder. Throws when a part is missing. */
export const openFactory = async (folder: string): Promise<FactoryFolder> => {
  const text = async (name: string): Promise<string> => await readFile(join(folder, name), 'utf8')
  const { rows } = JSON.parse(await text(files.batch)) as { rows: readonly { serial: string; ek?: string; idevid?: string }[] }
  const manifest = JSON.parse(await text(files.firmware)) as ReleaseManifest
  const images = Object.fromEntries(
    await Promise.all(stages.map(async ({ stage }) => [stage, new Uint8Array(await readFile(join(folder, 'images', `${stage}.bin`)))] as const)),
  ) as unknown as Images
  const release: Release = { manifest, images }
  const methods = new Map(
    rows.map(({ serial, ek, idevid }): [string, BoardMethod] => [serial, ek !== undefined ? 'tpm2' : idevid !== undefined ? 'idevid' : 'token']),
  )
  return {
    serials: rows.map(({ serial }) => serial),
    release,
    methodOf: (serial) => methods.get(serial) ?? 'tpm2',
    async element(serial) {
      const pem = await readFile(join(folder, 'boards', `${serial}.idevid`), 'utf8')
      return softwareSecureElement(createPrivateKey(pem), fromPem('CERTIFICATE', pem))
    },
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
