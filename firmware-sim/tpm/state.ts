import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { parsePublic } from '@fleetkey/tpm2/structures.ts'
import { freshLockout, type Lockout } from './lockout.ts'
import { loaded, type Sensitive, type TpmObject } from './objects.ts'
import type { NvIndex } from './nv.ts'

/** How the TPM was shut down last: not at all, not at all after protected entities were used, or by TPM2_Shutdown. */
export type Orderly = 'none' | 'protected-used' | 'clear' | 'state'

/** What TPM2_Shutdown(STATE) keeps for a resume. */
export interface Saved {
  readonly pcrs: readonly Uint8Array[]
  readonly pcrUpdates: number
  readonly restartCount: number
  readonly nullSeed: Uint8Array
  readonly platformAuth: Uint8Array
}

export interface HierarchyPolicy {
  readonly hash: number
  readonly digest: Uint8Array
}

/** What a simulated TPM keeps without power. Plain CBOR: this is a simulator, and whoever reads the file has its keys. */
export interface Durable {
  readonly endorsementSeed: Uint8Array
  readonly ownerSeed: Uint8Array
  readonly platformSeed: Uint8Array
  /** Sign tickets and obfuscate what leaves a hierarchy: the owner's, the endorsement's, the platform's. */
  readonly proof: Uint8Array
  readonly endorsementProof: Uint8Array
  readonly platformProof: Uint8Array
  /** Authorisation values and policies of hierarchies, by handle in decimal. */
  readonly auths: Readonly<Record<string, Uint8Array>>
  readonly policies: Readonly<Record<string, HierarchyPolicy>>
  readonly resetCount: number
  /** Starts since the factory: never goes back, unlike `resetCount`. */
  readonly starts: number
  /** Milliseconds that it was powered, and whether that never went back. */
  readonly clock: number
  readonly clockSafe: boolean
  readonly orderly: Orderly
  readonly saved: Saved | null
  readonly lockout: Lockout
  readonly clearDisabled: boolean
  /** Highest value that any NV counter has had. */
  readonly maxCounter: bigint
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
  external: object.external,
})

export const unpackObject = (packed: unknown): TpmObject => {
  const {
    public: bytes,
    above,
    hierarchy,
    sensitive,
    external = false,
  } = packed as { public: Uint8Array; above: Uint8Array; hierarchy: number; sensitive: Sensitive | null; external?: boolean }
  return { ...loaded(parsePublic(bytes), sensitive, hierarchy, hierarchy), qualifiedName: above, external }
}

export const packState = (state: Durable): Uint8Array =>
  encode({ format, ...state, persistent: [...state.persistent].map(([handle, object]) => [handle, packObject(object)]) })

/** Throws when it is not the state of a simulated TPM. What an older one did not keep is as in a new TPM. */
export const unpackState = (bytes: Uint8Array, random: (length: number) => Uint8Array): Durable => {
  const {
    format: found,
    persistent,
    ...rest
  } = decode(bytes) as Omit<Durable, 'persistent'> & { format: string; persistent: readonly (readonly [number, unknown])[] }
  if (found !== format) throw new Error('not the state of a simulated TPM')
  return { ...freshState(random), ...rest, persistent: new Map(persistent.map(([handle, packed]) => [handle, unpackObject(packed)])) }
}

/** A TPM as it leaves its factory. */
export const freshState = (random: (length: number) => Uint8Array): Durable => ({
  endorsementSeed: random(32),
  ownerSeed: random(32),
  platformSeed: random(32),
  proof: random(32),
  endorsementProof: random(32),
  platformProof: random(32),
  auths: {},
  policies: {},
  resetCount: 0,
  starts: 0,
  clock: 0,
  clockSafe: true,
  orderly: 'clear',
  saved: null,
  lockout: freshLockout,
  clearDisabled: false,
  maxCounter: 0n,
  nv: [],
  persistent: new Map(),
})
