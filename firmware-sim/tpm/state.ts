import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { parsePublic } from '@fleetkey/tpm2/structures.ts'
import { loaded, type Sensitive, type TpmObject } from './objects.ts'
import type { NvIndex } from './nv.ts'

/** What a simulated TPM keeps without power. Plain CBOR: this is a simulator, and whoever reads the file has its keys. */
export interface Durable {
  readonly endorsementSeed: Uint8Array
  readonly ownerSeed: Uint8Array
  readonly platformSeed: Uint8Array
  /** Signs tickets and obfuscates what leaves the owner hierarchy. */
  readonly proof: Uint8Array
  readonly auths: Readonly<Record<string, Uint8Array>>
  readonly resetCount: number
  /** Milliseconds that it was powered until it was last started. */
  readonly clock: number
  readonly nv: readonly NvIndex[]
  readonly persistent: ReadonlyMap<number, TpmObject>
}

const format = 'fleetkey/software-tpm/1'

/** An object as bytes, for the persistent ones and for saved contexts. */
export const packObject = (object: TpmObject): unknown => ({
  public: object.bytes,
  above: object.qualifiedName,
  hierarchy: object.hierarchy,
  sensitive: object.sensitive,
})

export const unpackObject = (packed: unknown): TpmObject => {
  const { public: bytes, above, hierarchy, sensitive } = packed as { public: Uint8Array; above: Uint8Array; hierarchy: number; sensitive: Sensitive | null }
  return { ...loaded(parsePublic(bytes), sensitive, hierarchy, hierarchy), qualifiedName: above }
}

export const packState = (state: Durable): Uint8Array =>
  encode({ format, ...state, persistent: [...state.persistent].map(([handle, object]) => [handle, packObject(object)]) })

/** Throws when it is not the state of a simulated TPM. */
export const unpackState = (bytes: Uint8Array): Durable => {
  const {
    format: found,
    persistent,
    ...rest
  } = decode(bytes) as Omit<Durable, 'persistent'> & { format: string; persistent: readonly (readonly [number, unknown])[] }
  if (found !== format) throw new Error('not the state of a simulated TPM')
  return { ...rest, persistent: new Map(persistent.map(([handle, packed]) => [handle, unpackObject(packed)])) }
}

/** A TPM as it leaves its factory. */
export const freshState = (random: (length: number) => Uint8Array): Durable => ({
  endorsementSeed: random(32),
  ownerSeed: random(32),
  platformSeed: random(32),
  proof: random(32),
  auths: {},
  resetCount: 0,
  clock: 0,
  nv: [],
  persistent: new Map(),
})
