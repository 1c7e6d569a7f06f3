import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { Secret } from '@fleetkey/protocol/secret.ts'
import type { OperatorToken } from '../access/caller.ts'
import type { RefusalCounter } from '../access/refusals.ts'
import type { AuditEntry, SequencedEntry } from '../audit/entry.ts'
import type { Campaign, Target } from '../campaigns/campaign.ts'
import { calendarOf, secondOf, unissuedOf, withdrawnOf, type Certificate, type Intent } from '../ca/certificate.ts'
import type { EnrolmentToken } from '../fleet/enrolment-token.ts'
import {
  acknowledgedOf,
  heldOf,
  type Batch,
  type Device,
  type Endorsement,
  type Group,
  type ManifestEntry,
  type Member,
  type Release,
  type Station,
} from '../fleet/device.ts'
import type { RecoveryBudget } from '../fleet/recovery.ts'
import type { Authority } from './authority.ts'
import type { Sessions } from './sessions.ts'
import type { Vault } from './vault.ts'
import type { Broadcast, Shard } from '../keys/broadcast.ts'
import type { DataKey, Grant, Holding, KeyEpoch, ManagedKey } from '../keys/key.ts'
import type { Span } from '../keys/span.ts'

/** A challenge waits for exactly one answer; spending it is a commit of its own. `id` is its 16 bytes in hex. */
export interface PendingChallenge {
  readonly id: string
  readonly version: number
  readonly client: string
  readonly purpose: 'enrol' | 'return'
  readonly hello: Uint8Array
  readonly challenge: Uint8Array
  /** What the answer has to show, encrypted under the KEK; null for methods that share none. */
  readonly secret: Uint8Array | null
  readonly expires: number
  readonly spentAt: number | null
}

/** A signed message waiting to be sent. Deleted when the device has acknowledged, or it is superseded. `id` sorts by time. */
export interface OutboxMessage {
  readonly id: string
  readonly version: number
  readonly device: DeviceId
  /** What it is about: `delivery/<key>/<epoch>`; a newer message about the same subject replaces it. */
  readonly subject: string
  readonly bytes: Uint8Array
  readonly createdAt: number
}

/** Outcome of a request that was already carried out, so that a repetition has the same answer. `id` is `<device>/<request id>`. */
export interface RequestRecord {
  readonly id: string
  readonly version: number
  readonly answer: Uint8Array
  readonly createdAt: number
}

export interface Setting {
  readonly id: string
  readonly version: number
  readonly value: Uint8Array
}

/** Every row has `id` (text) and `version` (set by the store: 1 on insert, +1 on each update). */
export interface Tables {
  device: Device
  manifest: ManifestEntry
  batch: Batch
  station: Station
  group: Group
  member: Member
  release: Release
  endorsement: Endorsement
  certificate: Certificate
  intent: Intent
  challenge: PendingChallenge
  key: ManagedKey
  epoch: KeyEpoch
  grant: Grant
  holding: Holding
  shard: Shard
  broadcast: Broadcast
  span: Span
  dataKey: DataKey
  campaign: Campaign
  target: Target
  outbox: OutboxMessage
  request: RequestRecord
  token: OperatorToken
  enrolmentToken: EnrolmentToken
  setting: Setting
}
export type Table = keyof Tables

/**
 * Fields that can be searched, per table, besides the id (and its prefixes). Unique ones refuse a second row; sparse ones are null in nearly every row, which then has no
 * entry to be written.
 */
export const indexes = {
  device: { state: 'plain', batch: 'plain', serial: 'unique', acknowledged: 'plain', held: 'plain' },
  manifest: { device: 'unique', serial: 'unique', batch: 'plain' },
  batch: {},
  station: {},
  group: {},
  member: { group: 'plain', device: 'plain' },
  release: { model: 'plain' },
  endorsement: {},
  certificate: { device: 'plain', spkiHash: 'unique', withdrawn: 'sparse', calendar: 'plain' },
  intent: { unissued: 'sparse' },
  challenge: { client: 'plain', since: 'plain' },
  key: {},
  epoch: { key: 'plain', state: 'plain' },
  grant: { key: 'plain', group: 'plain' },
  holding: { device: 'plain', key: 'plain', place: 'plain' },
  shard: {},
  broadcast: {},
  span: { of: 'plain', by: 'plain', open: 'unique', lot: 'plain' },
  dataKey: {},
  campaign: { key: 'plain', state: 'plain' },
  target: { campaign: 'plain', device: 'plain', place: 'plain' },
  outbox: { device: 'plain' },
  request: { since: 'plain' },
  token: { hash: 'unique' },
  enrolmentToken: { batch: 'plain' },
  setting: {},
} as const satisfies { readonly [T in Table]: Readonly<Partial<Record<(keyof Tables[T] & string) | DerivedOf<T>, 'plain' | 'unique' | 'sparse'>>> }

export type IndexOf<T extends Table> = keyof (typeof indexes)[T] & string

/** Index values that are no field of the row but follow from it; null: the row is not in that index. */
export const derived = {
  device: { acknowledged: acknowledgedOf, held: heldOf },
  certificate: { withdrawn: withdrawnOf, calendar: calendarOf },
  intent: { unissued: unissuedOf },
  challenge: { since: ({ expires }: PendingChallenge): string => secondOf(expires) },
  request: { since: ({ createdAt }: RequestRecord): string => secondOf(createdAt) },
} as const satisfies { readonly [T in Table]?: Readonly<Record<string, (row: Tables[T]) => string | null>> }
type DerivedOf<T extends Table> = T extends keyof typeof derived ? keyof (typeof derived)[T] & string : never

const whole = (value: string): string => value
/** Indexes whose rows are counted as they change, so that a count costs the same however many rows there are; by what part of the value. */
export const tallies = {
  device: { state: whole, acknowledged: whole, held: whole },
  member: { group: whole },
  holding: { place: whole },
  target: { place: whole },
  // By day: the time of day ends the value.
  certificate: { calendar: (value: string): string => value.slice(0, -'T00:00:00'.length) },
} as const satisfies { readonly [T in Table]?: { readonly [F in IndexOf<T>]?: (value: string) => string } }
export type TallyOf<T extends Table> = T extends keyof typeof tallies ? keyof (typeof tallies)[T] & string : never

/** Values of one index from `from` to `to`, both included. `after`: exclusive cursor. */
export interface Range {
  readonly from: string
  readonly to: string
  readonly after?: IndexEntry
  readonly limit: number
}
export interface IndexEntry {
  readonly value: string
  readonly id: string
}

/** `where`: every named index field equals the value. `after`: exclusive id cursor; rows come in ascending id (byte order). */
export interface Query<T extends Table> {
  readonly where?: { readonly [F in IndexOf<T>]?: string }
  readonly prefix?: string
  readonly after?: string
  readonly limit: number
}

export interface Tally {
  readonly value: string
  readonly rows: number
}

export type Write = {
  [T in Table]:
    | { readonly table: T; readonly do: 'insert'; readonly row: Tables[T] }
    /** Applied only if the stored version is still `row.version`. */
    | { readonly table: T; readonly do: 'update'; readonly row: Tables[T] }
    | { readonly table: T; readonly do: 'delete'; readonly id: string; readonly version: number }
}[Table]

export interface Changes {
  readonly writes: readonly Write[]
  /** At least one: nothing changes unaudited. */
  readonly entries: readonly AuditEntry[]
}

/** All or nothing. A conflict names the first write that did not apply; nothing of this commit is then written, entries included. */
export type Verdict =
  | { readonly committed: true; readonly sequence: number }
  | {
      readonly committed: false
      readonly conflict: { readonly table: Table; readonly id: string; readonly why: 'version' | 'exists' | 'missing' | 'unique'; readonly field?: string }
    }

export interface Passing {
  readonly passing: true
}
/** How work on a whole fleet reads a row. */
export const passing: Passing = { passing: true }

/**
 * The narrow store. `commit` resolves when durable (or with a conflict); throws Problem('unavailable') when the disk is full or gone,
 * after which the store is read-only until writing works again. `reserved` commits (revocation, audit of refusals) may use the reserve.
 */
export interface Store {
  /** `passing`: one of very many, read once: it takes no room from what is read again and again. */
  get<T extends Table>(table: T, id: string, options?: Passing): Promise<Tables[T] | undefined>
  find<T extends Table>(table: T, query: Query<T>): Promise<readonly Tables[T][]>
  /** Of one tallied value that is counted whole: at the same cost however many there are. */
  count<T extends Table>(table: T, where?: Query<T>['where']): Promise<number>
  /** Entries of an index in ascending order of value, then id (byte order); the rows themselves are not read. */
  scan<T extends Table>(table: T, index: IndexOf<T>, range: Range): Promise<readonly IndexEntry[]>
  /** How many rows have each value of a tally, from `from` to `to`, ascending; values that no row has are left out. */
  tally<T extends Table>(table: T, index: TallyOf<T>, of: { readonly from: string; readonly to: string }): Promise<readonly Tally[]>
  commit(changes: Changes, options?: { readonly reserved?: boolean }): Promise<Verdict>
  audit(query: { readonly after: number; readonly limit: number }): Promise<readonly SequencedEntry[]>
  /** Signed tree head: C2SP tlog-checkpoint text, newest first. */
  checkpoint(): Promise<{ readonly size: number; readonly root: Uint8Array; readonly chain: Uint8Array }>
  health(): { readonly writable: boolean; readonly reason: string | null }
  close(): Promise<void>
}

export type KmsKeyPurpose =
  | 'root-ca'
  | 'issuing-ca'
  | 'server-tls'
  | 'challenge-signing'
  | 'delivery-signing'
  | 'group-signing'
  | 'release-signing'
  | 'audit-signing'
  | 'ocsp-signing'
  | 'kek'

/** Where CA keys and the KEK live. Batched and asynchronous from the first day, so that it can move behind a socket or into an HSM. */
export interface Kms {
  /** Idempotent per `name`. P-256 for signing purposes, AES-256 for `kek`. */
  create(name: string, purpose: KmsKeyPurpose): Promise<KmsKey>
  describe(name: string): Promise<KmsKey | undefined>
  list(): Promise<readonly KmsKey[]>
  /** ECDSA P-256 with SHA-256 over `data`; DER signatures, in the order asked. Each key signs only for its purpose. */
  sign(batch: readonly { readonly key: string; readonly purpose: KmsKeyPurpose; readonly data: Uint8Array }[]): Promise<readonly Uint8Array[]>
  wrap(batch: readonly { readonly key: string; readonly plaintext: Secret; readonly context: Uint8Array }[]): Promise<readonly Uint8Array[]>
  unwrap(batch: readonly { readonly key: string; readonly wrapped: Uint8Array; readonly context: Uint8Array }[]): Promise<readonly Secret[]>
  destroy(name: string): Promise<void>
  close(): Promise<void>
}

export interface KmsKey {
  readonly name: string
  readonly purpose: KmsKeyPurpose
  /** DER SubjectPublicKeyInfo; null for the KEK. */
  readonly spki: Uint8Array | null
  readonly uses: number
  /** Kind of back end that has it. */
  readonly place: string
}

/** How the process that holds the keys stands: sealed, it does nothing before it is given what opens them. */
export interface SealStatus {
  readonly sealed: boolean
  /** What is missing, in words; null while it is open. */
  readonly reason: string | null
  /** What opens it besides shares. */
  readonly ways: readonly ('file' | 'passphrase')[]
  /** Sets of shares that open it: the one in force, and perhaps one that nobody has confirmed. */
  readonly sets: readonly {
    /** 16 hex digits. */
    readonly set: string
    readonly shares: number
    readonly threshold: number
    readonly confirmed: boolean
    /** Once confirmed nothing else opens it. */
    readonly only: boolean
    /** Numbers of the shares that are at hand. */
    readonly gathered: readonly number[]
  }[]
  /** Wrong shares since it was last opened by shares. */
  readonly wrong: number
  /** To which shares are sealed on their way to it (65 bytes, P-256); another at each of its starts. */
  readonly recipient: Uint8Array
}

export interface SplitOrder {
  readonly shares: number
  readonly threshold: number
  /** Once this set is confirmed nothing else opens the keys. */
  readonly only: boolean
}

/** What one share has done. */
export interface HandedIn {
  readonly status: SealStatus
  readonly set: string
  readonly index: number
  /** It was not at hand already. */
  readonly fresh: boolean
}

/** What opens the keys. Shares pass through as they were sealed (protocol/share.ts): only the process that holds the keys reads them. */
export interface Seal {
  status(): Promise<SealStatus>
  /** One share. `reset`: forgets those gathered before it. Throws Problem: `conflict` when it is open, `malformed`, `forbidden` (reason `seal.share.…`) for a wrong one. */
  unseal(share: Uint8Array, reset: boolean): Promise<HandedIn>
  /** A new set, sealed to `recipient` (65 bytes, P-256). Nothing is replaced before it is confirmed. */
  split(order: SplitOrder, recipient: Uint8Array): Promise<{ readonly set: string; readonly shares: readonly Uint8Array[] }>
  confirm(set: string): Promise<SealStatus>
}

/** What a connection rests on: the key of the CA that has issued its certificate, and when that ends, milliseconds since 1970. */
export interface SessionCertificate {
  readonly issuer: string
  readonly notAfter: number
}

/** Who sent a message, as the transport proved it. */
export interface DeviceRef {
  /** Client id: device id, or `e-…` without identity. */
  readonly client: string
  readonly device: DeviceId | null
  /** Address prefix for accounting (IPv4 /24, IPv6 /48). */
  readonly from: string
  /** TLS exporter of this connection with our label (32 bytes); null on an external broker. */
  readonly exporter: Uint8Array | null
  readonly connection: number
  /** Absent without identity, and where another broker has judged it. */
  readonly certificate?: SessionCertificate
}

/** The smallest interface that covers every MQTT engine. */
export interface Bus {
  /** Resolving means durable: PUBACK leaves then. */
  start(handler: (from: DeviceRef, bytes: Uint8Array) => Promise<void>): Promise<void>
  /** Best effort; durability is the outbox. */
  send(client: string, bytes: Uint8Array): Promise<'accepted' | 'offline'>
  publish(groupTopic: string, bytes: Uint8Array): Promise<void>
  /** Group topics that this client may hear from now on; what it hears of others ends. */
  assign(client: string, groupTopics: readonly string[]): void
  /** Closes every live connection of the client; resolves when closed. */
  kick(client: string, reason: string): Promise<void>
  online(client: string): boolean
  onPresence(listener: (from: DeviceRef, present: boolean) => void): void
  health(): { readonly listening: boolean; readonly connections: number }
  stop(): Promise<void>
}

/** What every change needs from outside. */
export interface Base {
  readonly tenant: string
  readonly store: Store
  readonly kms: Kms
  readonly refusals: RefusalCounter
  readonly now: () => number
  readonly random: (length: number) => Uint8Array
  /** One line for the operator's log; never key bytes, never unbounded. */
  readonly log: (line: string) => void
  /** Named durable steps; fault runs end the process there. */
  readonly step: (name: string) => void
}

/** Everything a flow needs once the server is set up. */
export interface Context extends Base {
  readonly bus: Bus
  readonly authority: Authority
  readonly vault: Vault
  readonly sessions: Sessions
  /** How often a device may prove itself anew before a person decides. */
  readonly recoveries: RecoveryBudget
  /** Has the clock look at this campaign soon: something happened that may change its next step. */
  readonly wake: (campaign: string) => void
  /** Tells whoever publishes their status that these rows are durable. Nothing that decides here depends on it. */
  readonly certificatesChanged: (certificates: readonly Certificate[]) => void
}
