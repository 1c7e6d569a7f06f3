import type { MethodName } from '@fleetkey/protocol/messages.ts'

declare const proof: unique symbol

/** What is proven about the state a device is in: its measured boot and its TPM's clock. */
export interface StateContent {
  /** PCR index → hex SHA-256 value, replayed from the log and confirmed by the quote. */
  readonly pcrs: Readonly<Record<string, string>>
  readonly events: number
  readonly resetCount: number
  readonly restartCount: number
  readonly clockSafe: boolean
  /** Milliseconds that the TPM was powered. */
  readonly clock: bigint
  readonly firmwareVersion: bigint
  /** What the kernel measured since the boot; null where nobody asked for it. */
  readonly ima: ImaClaims | null
}

/** What is proven of the measurement list of this boot, from its first entry on. */
export interface ImaClaims {
  /** How many entries lead to PCR 10 as it was quoted. */
  readonly entries: number
  /** Hex: PCR 10 after them. */
  readonly value: string
  /** Entries behind those, as far as they are known of: proven by nothing yet. */
  readonly pending: number
  /** Files that changed while they were measured: nobody knows what was read. */
  readonly violations: number
  /** The release whose list of files the entries were compared with; null where none matches. */
  readonly comparedWith: string | null
  /** Entries whose file digest that release does not list; 0 when it has no list. */
  readonly unlisted: number
  /** The first of them, for a person: its digest, and what the kernel called it. */
  readonly firstUnlisted: string | null
}

/** The state alone, as a re-attestation proves it. */
export interface StateClaims extends StateContent {
  readonly [proof]: true
}

/**
 * What is proven authentic and fresh about a device. Proof is a type: only a method's `verify` makes it (`makeClaims` is
 * called there and nowhere else), so policy can take nothing less.
 */
export type Claims = ClaimsContent & { readonly [proof]: true }
export type Tpm2Claims = Tpm2Content & { readonly [proof]: true }

export type ClaimsContent = Tpm2Content | SoftwareContent

/** What is proven of a device by whatever method. */
interface DeviceContent {
  readonly method: MethodName
  /** What the batch manifest knows the hardware by. */
  readonly hardware: string
  /** `simulated` when a test endorsement vouches for the hardware. */
  readonly assurance: 'token' | 'simulated' | 'idevid' | 'attested'
  /** Subject of the endorsement that vouches for the hardware; null when the signed batch manifest alone does. */
  readonly endorsement: string | null
  /** SHA-256 (hex) of every CA certificate that vouches for the hardware, nearest first; empty when the manifest alone does. */
  readonly endorsedBy: readonly string[]
  /** DER SubjectPublicKeyInfo. */
  readonly ldevidSpki: Uint8Array
  readonly tlsSpki: Uint8Array
}

/** A device with keys in software: its firmware is not measured. */
export interface SoftwareContent extends DeviceContent {
  readonly method: 'idevid' | 'token'
  /** DER SubjectPublicKeyInfo of the key that keys are wrapped to; null for a device that has none (EST). */
  readonly recipientSpki: Uint8Array | null
  /** What is proven besides, as it is kept beside the verdict. */
  readonly facts: readonly { readonly name: string; readonly value: string }[]
}

export interface Tpm2Content extends StateContent, DeviceContent {
  readonly method: 'tpm2'
  readonly assurance: 'simulated' | 'attested'
  /** `id:49465800`, as the EK certificate names the maker; null without certificate. */
  readonly manufacturer: string | null
  /** TPM names of the proven keys. */
  readonly ak: Uint8Array
  readonly srk: Uint8Array
  readonly ldevid: Uint8Array
  readonly recipient: Uint8Array
  /** TPMT_PUBLIC of the keys that something is wrapped to. */
  readonly srkPublic: Uint8Array
  readonly recipientPublic: Uint8Array
}

export const makeStateClaims = (content: StateContent): StateClaims => content as StateClaims
export const makeClaims = <C extends ClaimsContent>(content: C): C & Claims => content as C & Claims

/** Claims in the form they are kept in beside a verdict: names are stable, values are text. */
export const recordOf = (claims: StateContent): readonly { readonly name: string; readonly value: string }[] => [
  ...Object.entries(claims.pcrs).map(([pcr, value]) => ({ name: `pcr-${pcr}`, value })),
  { name: 'events', value: String(claims.events) },
  { name: 'reset-count', value: String(claims.resetCount) },
  { name: 'restart-count', value: String(claims.restartCount) },
  { name: 'clock-safe', value: claims.clockSafe ? 'yes' : 'no' },
  { name: 'clock', value: String(claims.clock) },
  { name: 'tpm-firmware', value: claims.firmwareVersion.toString(16) },
  ...(claims.ima === null ? [] : imaRecord(claims.ima)),
]

const imaRecord = (ima: ImaClaims): readonly { readonly name: string; readonly value: string }[] => [
  { name: 'ima-entries', value: String(ima.entries) },
  { name: 'ima-pcr-10', value: ima.value },
  { name: 'ima-pending', value: String(ima.pending) },
  { name: 'ima-violations', value: String(ima.violations) },
  { name: 'ima-unlisted', value: String(ima.unlisted) },
  ...(ima.comparedWith === null ? [] : [{ name: 'ima-compared-with', value: ima.comparedWith }]),
  ...(ima.firstUnlisted === null ? [] : [{ name: 'ima-first-unlisted', value: ima.firstUnlisted }]),
]

const recordedIma = (values: ReadonlyMap<string, string>): ImaClaims | null => {
  const value = values.get('ima-pcr-10')
  if (value === undefined) return null
  const count = (name: string): number => Number(values.get(name) ?? 0)
  return {
    entries: count('ima-entries'),
    value,
    pending: count('ima-pending'),
    violations: count('ima-violations'),
    comparedWith: values.get('ima-compared-with') ?? null,
    unlisted: count('ima-unlisted'),
    firstUnlisted: values.get('ima-first-unlisted') ?? null,
  }
}

/** The state that was proven when it was recorded; undefined when nothing was measured (devices without a TPM, evidence that did not verify). */
export const recordedState = (record: readonly { readonly name: string; readonly value: string }[]): StateClaims | undefined => {
  const values = new Map(record.map(({ name, value }) => [name, value]))
  const pcrs = Object.fromEntries(record.flatMap(({ name, value }) => (name.startsWith('pcr-') ? [[name.slice(4), value] as const] : [])))
  if (Object.keys(pcrs).length === 0) return undefined
  return makeStateClaims({
    pcrs,
    events: Number(values.get('events') ?? 0),
    resetCount: Number(values.get('reset-count') ?? 0),
    restartCount: Number(values.get('restart-count') ?? 0),
    clockSafe: values.get('clock-safe') === 'yes',
    clock: BigInt(values.get('clock') ?? 0),
    firmwareVersion: BigInt(`0x${values.get('tpm-firmware') ?? '0'}`),
    ima: recordedIma(values),
  })
}
