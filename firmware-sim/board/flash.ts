import { createHash } from 'node:crypto'
import { stages, type Images, type ReleaseManifest, type StageName } from '../release/release.ts'

/** Where a power cut happens: after so many block writes. The write that is cut leaves half a block. */
export interface PowerSupply {
  /** Called before each block write; throws PowerLost when the power goes. */
  beforeWrite(): 'ok' | 'torn'
}

export class PowerLost extends Error {
  override readonly name = 'PowerLost'
}

/** Power that fails at write number `at` (0-based) of this supply. */
export const failingPower = (at: number): PowerSupply => {
  let writes = 0
  return { beforeWrite: () => (writes++ === at ? 'torn' : 'ok') }
}
export const steadyPower: PowerSupply = { beforeWrite: () => 'ok' }

const blockSize = 512
type SlotName = 'a' | 'b'

/** Which slot boots, in two copies of one block each: the valid copy with the higher sequence counts. */
interface BootRecord {
  readonly sequence: number
  readonly slot: SlotName
  readonly manifest: ReleaseManifest
}

/**
 * A/B flash of a board that can lose its power at any block write. An update goes to the slot that does not boot and counts only
 * once its boot record is written: a cut leaves either the old or the new release, never a mixture.
 */
export class Flash {
  readonly #slots: Record<SlotName, Map<StageName, Uint8Array>> = { a: new Map(), b: new Map() }
  readonly #records: [Uint8Array, Uint8Array] = [new Uint8Array(0), new Uint8Array(0)]

  /** What the boot ROM reads: the manifest and images of the slot that boots; `undefined` on an empty flash. */
  boot(): { readonly manifest: ReleaseManifest; readonly images: Images } | undefined {
    const record = this.#bootRecord()
    if (record === undefined) return undefined
    const slot = this.#slots[record.slot]
    const images = Object.fromEntries(stages.map(({ stage }) => [stage, slot.get(stage) ?? new Uint8Array(0)])) as unknown as Images
    return { manifest: record.manifest, images }
  }

  /** Writes a release to the slot that does not boot, then switches. Throws PowerLost where `power` fails. */
  update(release: { readonly manifest: ReleaseManifest; readonly images: Images }, power: PowerSupply = steadyPower): void {
    const current = this.#bootRecord()
    const target: SlotName = current?.slot === 'a' ? 'b' : 'a'
    for (const { stage } of stages) this.#write(this.#slots[target], stage, release.images[stage], power)
    const record: BootRecord = { sequence: (current?.sequence ?? 0) + 1, slot: target, manifest: release.manifest }
    // The copies alternate: the one that is overwritten is the older one.
    this.#writeRecord(record.sequence % 2 === 0 ? 0 : 1, record, power)
  }

  /** What an attacker with a programmer does: changes bytes of the booting slot behind the manifest's back. */
  tamper(stage: StageName, change: (bytes: Uint8Array) => Uint8Array): void {
    const record = this.#bootRecord()
    if (record === undefined) return
    const slot = this.#slots[record.slot]
    slot.set(stage, change(Uint8Array.from(slot.get(stage) ?? new Uint8Array(0))))
  }

  #bootRecord(): BootRecord | undefined {
    const valid = this.#records.map(readRecord).filter((record) => record !== undefined)
    return valid.toSorted((one, other) => other.sequence - one.sequence)[0]
  }

  #write(slot: Map<StageName, Uint8Array>, stage: StageName, bytes: Uint8Array, power: PowerSupply): void {
    const area = new Uint8Array(bytes.length)
    slot.set(stage, area)
    for (let at = 0; at < bytes.length; at += blockSize) {
      const block = bytes.subarray(at, at + blockSize)
      if (power.beforeWrite() === 'torn') {
        area.set(block.subarray(0, block.length >> 1), at)
        throw new PowerLost(`while writing ${stage} at ${at}`)
      }
      area.set(block, at)
    }
  }

  #writeRecord(copy: 0 | 1, record: BootRecord, power: PowerSupply): void {
    const body = Buffer.from(JSON.stringify(record))
    const bytes = Buffer.concat([createHash('sha256').update(body).digest(), body])
    if (power.beforeWrite() === 'torn') {
      this.#records[copy] = bytes.subarray(0, bytes.length >> 1)
      throw new PowerLost('while writing the boot record')
    }
    this.#records[copy] = bytes
  }
}

const readRecord = (bytes: Uint8Array): BootRecord | undefined => {
  if (bytes.length < 33) return undefined
  const body = bytes.subarray(32)
  return createHash('sha256').update(body).digest().equals(bytes.subarray(0, 32)) ? (JSON.parse(Buffer.from(body).toString('utf8')) as BootRecord) : undefined
}
