import { createHash } from 'node:crypto'

/** Boot stages in the order they run, and the PCR (SHA-256 bank) each is measured into. */
export const stages = [
  { stage: 'bootloader', pcr: 0 },
  { stage: 'config', pcr: 1 },
  { stage: 'kernel', pcr: 4 },
  { stage: 'initrd', pcr: 5 },
  { stage: 'agent', pcr: 11 },
] as const
export type StageName = (typeof stages)[number]['stage']

/** The bytes of each stage. */
export type Images = Readonly<Record<StageName, Uint8Array>>

/** What the maker says a release consists of; reference values are computed from this and nothing else. */
export interface ReleaseManifest {
  readonly format: 'fleetkey/firmware/1'
  readonly model: string
  readonly name: string
  /** Only grows: the anti-rollback number. */
  readonly number: number
  /** Built for developers; a server quarantines it unless a group's policy says otherwise. */
  readonly debug: boolean
  readonly images: Readonly<Record<StageName, { readonly sha256: string; readonly size: number }>>
}

export interface Release {
  readonly manifest: ReleaseManifest
  readonly images: Images
}

/** One measurement of a boot: what is extended into which PCR. */
export interface Measurement {
  readonly pcr: number
  /** EV_SEPARATOR ends the pre-OS part of PCRs 0 to 7 (TCG PC Client PFP §3.3.2.2), everything else is EV_POST_CODE-like firmware. */
  readonly kind: 'image' | 'separator'
  readonly digest: Uint8Array
  readonly description: string
}

const sha256 = (data: Uint8Array): Uint8Array => createHash('sha256').update(data).digest()

/** EV_SEPARATOR's event data: four zero bytes. */
export const separatorData = new Uint8Array(4)

/** The measurements of one boot in order, given the digest of each stage's image. The one place that knows the order. */
export const measurementsOf = (digests: Readonly<Record<StageName, Uint8Array>>): readonly Measurement[] => {
  const image = (stage: StageName, pcr: number): Measurement => ({ pcr, kind: 'image', digest: digests[stage], description: stage })
  const separators = Array.from({ length: 8 }, (_, pcr): Measurement => ({ pcr, kind: 'separator', digest: sha256(separatorData), description: 'separator' }))
  const preOs = stages.filter(({ stage }) => stage === 'bootloader' || stage === 'config')
  const os = stages.filter(({ stage }) => stage !== 'bootloader' && stage !== 'config')
  return [...preOs.map(({ stage, pcr }) => image(stage, pcr)), ...separators, ...os.map(({ stage, pcr }) => image(stage, pcr))]
}

/** PCR values after these measurements, from zeros: PCR_new = SHA-256(PCR_old ‖ digest). PCRs 0-7 and 11. */
export const predictPcrs = (measurements: readonly Measurement[]): Readonly<Record<string, string>> => {
  const values = new Map<number, Uint8Array>([0, 1, 2, 3, 4, 5, 6, 7, 11].map((pcr) => [pcr, new Uint8Array(32)]))
  for (const { pcr, digest } of measurements) values.set(pcr, sha256(Buffer.concat([values.get(pcr) ?? new Uint8Array(32), digest])))
  return Object.fromEntries([...values].map(([pcr, value]) => [String(pcr), Buffer.from(value).toString('hex')]))
}

/** Files that every boot of a release uses, and the stage whose image each is: the kernel measures them (Linux IMA). */
export const systemFiles = [
  { path: '/init', stage: 'initrd' },
  { path: '/usr/bin/fleetkey-agent', stage: 'agent' },
] as const satisfies readonly { readonly path: string; readonly stage: StageName }[]

/**
 * Reference values by prediction from the manifest, not from a golden machine. JSON text of `fleetkey/release/1`, to be signed by a station. `files`: hex SHA-256 of
 * further files that may run under it.
 */
export const referenceValues = (manifest: ReleaseManifest, files: readonly string[] = []): string => {
  const digests = Object.fromEntries(stages.map(({ stage }) => [stage, Buffer.from(manifest.images[stage].sha256, 'hex')])) as unknown as Record<
    StageName,
    Uint8Array
  >
  const { model, name, number, debug } = manifest
  const listed = [...new Set([...systemFiles.map(({ stage }) => manifest.images[stage].sha256), ...files])]
  const values = { format: 'fleetkey/release/1', model, name, number, debug, pcrs: predictPcrs(measurementsOf(digests)), files: listed }
  return `${JSON.stringify(values, null, 2)}\n`
}

/** A release from its images. */
export const buildRelease = (of: { model: string; name: string; number: number; debug?: boolean }, images: Images): Release => ({
  manifest: {
    format: 'fleetkey/firmware/1',
    ...of,
    debug: of.debug ?? false,
    images: Object.fromEntries(
      stages.map(({ stage }) => [stage, { sha256: createHash('sha256').update(images[stage]).digest('hex'), size: images[stage].length }]),
    ) as unknown as ReleaseManifest['images'],
  },
  images,
})

/**
 * Images of a simulated release: each stage is filled from a seed (SHA-256 in counter mode), except the agent package, which is given.
 * Same seed, same bytes.
 */
export const simulatedImages = (seed: string, agent: Uint8Array, size = 16 << 10): Images => {
  const fill = (stage: StageName): Uint8Array => {
    const blocks = Array.from({ length: Math.ceil(size / 32) }, (_, block) => createHash('sha256').update(`${seed}/${stage}/${block}`).digest())
    return Buffer.concat(blocks).subarray(0, size)
  }
  return { bootloader: fill('bootloader'), config: fill('config'), kernel: fill('kernel'), initrd: fill('initrd'), agent }
}
