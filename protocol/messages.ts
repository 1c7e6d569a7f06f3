import { z } from 'zod'
import { DeviceId, EnrolmentId, Epoch, GroupAddress, GroupId, KeyId, RowId, TenantId } from './ids.ts'
import { maxWraps } from './subset-difference/broadcast.ts'
import { slots } from './subset-difference/tree.ts'

/**
 * Every message between device and server: one strict schema each. On the wire a message is a COSE_Sign1 (signed.ts)
 * whose payload is the deterministic CBOR of `Envelope` with one of these bodies. Unknown fields are refused.
 * Times are milliseconds since 1970 (UTC).
 */
const bytes = (max: number, min = 0) =>
  z.custom<Uint8Array>((value) => value instanceof Uint8Array && value.length >= min && value.length <= max, { message: `expected ${min} to ${max} bytes` })
const fixed = (length: number) => bytes(length, length)
const time = z.int().min(0)
const tpmPublic = bytes(1024, 8)
const attested = z.strictObject({ attest: bytes(1024, 8), signature: bytes(600, 8) })
const certificate = bytes(4096, 64)
/** DER SubjectPublicKeyInfo of a P-256 key in its canonical form: the point uncompressed. */
const p256 = fixed(91)

export const Protection = z.enum(['sealed', 'tpm'])
export type Protection = z.infer<typeof Protection>
/** `sealed` keys are A256GCM (opened in memory), `tpm` keys are HS256 (imported into the TPM, never in memory). */
export const KeyAlgorithm = z.enum(['A256GCM', 'HS256'])
export type KeyAlgorithm = z.infer<typeof KeyAlgorithm>

export const PcrSelection = z
  .array(z.strictObject({ hash: z.enum(['sha256', 'sha384']), pcrs: z.array(z.int().min(0).max(23)).min(1).max(24) }))
  .min(1)
  .max(2)
export type PcrSelection = z.infer<typeof PcrSelection>

/** What a device presents before it is challenged, per attestation method. The keys of a TPM are TPMT_PUBLIC. */
const PresentedTpm2 = z.strictObject({
  method: z.literal('tpm2'),
  ekCertificate: bytes(4096).nullable(),
  ek: tpmPublic,
  ak: tpmPublic,
  srk: tpmPublic,
  ldevid: tpmPublic,
})
/** `chain`: the IDevID certificate (IEEE 802.1AR), then what leads to its root, which the server knows itself. */
const PresentedIdevid = z.strictObject({ method: z.literal('idevid'), chain: z.array(certificate).min(1).max(4), ldevid: p256, recipient: p256 })
/** `token`: the public half of a single-use token; null: none is left, the LDevID key is known. */
const PresentedToken = z.strictObject({ method: z.literal('token'), token: fixed(16).nullable(), ldevid: p256, recipient: p256 })
export const PresentedEvidence = z.discriminatedUnion('method', [PresentedTpm2, PresentedIdevid, PresentedToken])
export type PresentedEvidence = z.infer<typeof PresentedEvidence>
/** How a device proves what it is. */
export type MethodName = PresentedEvidence['method']

/** Device → server, first round trip of enrolment. Signed by the LDevID key it carries (proof that the sender can use it). */
export const Hello = z.strictObject({
  type: z.literal('hello'),
  serial: z.string().min(1).max(64),
  purpose: z.enum(['enrol', 'return']),
  presented: PresentedEvidence,
  random: fixed(32),
  agent: z.string().max(64),
})
export type Hello = z.infer<typeof Hello>
/** A hello by one method. */
export type HelloOf<M extends MethodName> = Hello & { presented: Extract<PresentedEvidence, { method: M }> }

/** Under which policy keys are made that work under approved firmware only: PolicyAuthorize(Name(signer), ref). `signer`: the server's release-signing key, as LoadExternal takes it. */
export const FirmwarePolicy = z.strictObject({ signer: tpmPublic, ref: fixed(32) })
export type FirmwarePolicy = z.infer<typeof FirmwarePolicy>

/** At most so many releases of a model are approved at a time: those with the highest numbers. */
export const maxApprovals = 64

/** One approved release. `policy`: PolicyPCR over these PCRs of the SHA-256 bank with its values; `signature`: raw r‖s by the signer over `policy ‖ ref`. */
const ApprovedRelease = z.strictObject({
  release: z.string().min(1).max(160),
  number: z.int().min(0).max(0xffff_ffff),
  pcrs: z.array(z.int().min(0).max(23)).min(1).max(24),
  policy: fixed(32),
  signature: fixed(64),
})
const approvalSet = { signer: tpmPublic, ref: fixed(32), approvals: z.array(ApprovedRelease).max(maxApprovals) }
/** What is approved under one policy. Public, and worth nothing under another policy. */
export const ApprovalSet = z.strictObject(approvalSet)
export type ApprovalSet = z.infer<typeof ApprovalSet>

/** What the answer has to show besides, per attestation method. `firmware`: what the recipient key of the answer has to be made under. */
const DemandedTpm2 = z.strictObject({
  method: z.literal('tpm2'),
  credential: z.strictObject({ blob: bytes(512), secret: bytes(600) }),
  selection: PcrSelection,
  firmware: FirmwarePolicy,
})
const DemandedIdevid = z.strictObject({ method: z.literal('idevid') })
const DemandedToken = z.strictObject({ method: z.literal('token') })
export const Demanded = z.discriminatedUnion('method', [DemandedTpm2, DemandedIdevid, DemandedToken])
export type Demanded = z.infer<typeof Demanded>

/** Server → device. `hello` = SHA-256 of the signed hello as sent. */
export const Challenge = z.strictObject({
  type: z.literal('challenge'),
  challenge: fixed(16),
  hello: fixed(32),
  random: fixed(32),
  demanded: Demanded,
  expires: time,
})
export type Challenge = z.infer<typeof Challenge>
export type ChallengeOf<M extends MethodName> = Challenge & { demanded: Extract<Demanded, { method: M }> }

/** What proves the presented keys and the device's state, per attestation method. */
const ProvenTpm2 = z.strictObject({
  method: z.literal('tpm2'),
  proof: fixed(32),
  quote: attested,
  eventLog: bytes(1 << 20),
  recipient: tpmPublic,
  certify: z.strictObject({ srk: attested, ldevid: attested, recipient: attested }),
})
/** `signature`: by the IDevID key, raw r‖s (P-256 with SHA-256, P-384 with SHA-384). */
const ProvenIdevid = z.strictObject({ method: z.literal('idevid'), signature: bytes(96, 64) })
/** `proof`: HMAC keyed from the token, which itself is never sent; null without a token. `signature`: by the LDevID key, raw r‖s. */
const ProvenToken = z.strictObject({ method: z.literal('token'), proof: fixed(32).nullable(), signature: fixed(64) })
export const ProvenEvidence = z.discriminatedUnion('method', [ProvenTpm2, ProvenIdevid, ProvenToken])
export type ProvenEvidence = z.infer<typeof ProvenEvidence>

/** Device → server, second round trip. See transcript.ts for what `proof`, `signature`, `qualifyingData` and `binding` commit to. */
export const Answer = z.strictObject({
  type: z.literal('answer'),
  challenge: fixed(16),
  proven: ProvenEvidence,
  csr: z.strictObject({ ldevid: bytes(2048, 32), tls: bytes(2048, 32) }),
  binding: bytes(128, 8),
})
export type Answer = z.infer<typeof Answer>
export type AnswerOf<M extends MethodName> = Answer & { proven: Extract<z.infer<typeof ProvenEvidence>, { method: M }> }

/** Server → device: certificates (DER), trust (root certificates, DER), the certificates of the server's message-signing keys; what firmware its keys work under. */
export const Identity = z.strictObject({
  type: z.literal('identity'),
  re: fixed(16),
  device: DeviceId,
  ldevid: certificate.nullable(),
  tls: certificate,
  chain: z.array(certificate).min(1).max(24),
  trust: z.array(certificate).min(1).max(8),
  keys: z.array(certificate).min(1).max(8),
  approvals: ApprovalSet.nullable(),
  time,
})
export type Identity = z.infer<typeof Identity>

/** Server → device: the request `re` was refused with this public code. */
export const Refusal = z.strictObject({
  type: z.literal('refusal'),
  re: fixed(16),
  code: z.enum([
    'malformed',
    'unsupported',
    'unauthenticated',
    'forbidden',
    'attestation-failed',
    'not-found',
    'conflict',
    'expired',
    'rate-limited',
    'unavailable',
    'internal',
  ]),
  retryAfter: z.int().min(0).max(86_400).nullable(),
})
export type Refusal = z.infer<typeof Refusal>

/** Server → device, first message of every connection: the nonce its reports must carry, and signed time. */
export const Welcome = z.strictObject({ type: z.literal('welcome'), session: fixed(16), time, reportEvery: z.int().min(1).max(86_400) })
export type Welcome = z.infer<typeof Welcome>

/** A device's place in a group that is served by broadcast: its slot in one shard, for the labels of one generation. */
const place = {
  group: GroupId,
  shard: z.int().min(0).max(99_999),
  generation: z.int().min(1).max(0xffff_ffff),
  slot: z
    .int()
    .min(0)
    .max(slots - 1),
}
export const Place = z.strictObject(place)
export type Place = z.infer<typeof Place>

/** Device → server on every connect and on the heartbeat: what it holds. The server answers with the difference. */
export const Report = z.strictObject({
  type: z.literal('report'),
  session: fixed(16),
  sequence: z.int().min(0),
  holdings: z.array(z.strictObject({ key: KeyId, epochs: z.array(z.strictObject({ epoch: Epoch, stage: z.enum(['installed', 'active']) })).max(16) })).max(256),
  /** Messages that this device has protected under an epoch that it holds, never less than it did; epochs that are not here: none. */
  usage: z.array(z.strictObject({ key: KeyId, epoch: Epoch, messages: z.int().min(0) })).max(256),
  /** The places that it holds labels for. */
  places: z.array(Place).max(32),
  resetCount: z.int().min(0).max(0xffff_ffff),
  tlsNotAfter: time,
  /** The trust bundle that it has stored, and trustDigest of it (transcript.ts); null: that of its configuration. This is its acknowledgement. */
  trust: z.strictObject({ version: z.int().min(1).max(0xffff_ffff), digest: fixed(32) }).nullable(),
  agent: z.string().max(64),
})
export type Report = z.infer<typeof Report>

/** The COSE_Encrypt0 (HPKE-7 to the recipient key) holds the key itself, or for `tpm` the inner wrapper's key of the TPM2_Import blob. */
export const Wrapped = z.discriminatedUnion('protection', [
  z.strictObject({ protection: z.literal('sealed'), sealed: bytes(1024, 32) }),
  z.strictObject({ protection: z.literal('tpm'), sealed: bytes(1024, 32), public: bytes(256, 8), duplicate: bytes(512, 8), seed: bytes(600, 8) }),
])
export type Wrapped = z.infer<typeof Wrapped>

/**
 * Server → device: one epoch of one key. `activate` says whether to take it into use at once (nothing older is in use,
 * or the campaign has already activated it). `nonce` is what the proof of use must cover.
 */
export const Delivery = z.strictObject({
  type: z.literal('delivery'),
  key: KeyId,
  algorithm: KeyAlgorithm,
  epoch: Epoch,
  campaign: RowId.nullable(),
  nonce: fixed(16),
  activate: z.boolean(),
  readOnly: z.boolean(),
  wrapped: Wrapped,
})
export type Delivery = z.infer<typeof Delivery>

/** Server → device: take this installed epoch into use and prove it. */
export const Activate = z.strictObject({ type: z.literal('activate'), key: KeyId, epoch: Epoch, campaign: RowId.nullable(), nonce: fixed(16) })
export type Activate = z.infer<typeof Activate>

/** Server → device: erase every epoch of the key below `below` and state so. `below` null: all of them (grant withdrawn). */
export const Retire = z.strictObject({ type: z.literal('retire'), key: KeyId, below: Epoch.nullable(), campaign: RowId.nullable(), nonce: fixed(16) })
export type Retire = z.infer<typeof Retire>

/** Server → device: its labels (79 × 32 bytes, COSE_Encrypt0 to the recipient key), in place of those that it has for the group. `sealed` null: it is in the group no more and erases them. */
export const Labels = z.strictObject({ type: z.literal('labels'), ...place, sealed: bytes(4096, 32).nullable() })
export type Labels = z.infer<typeof Labels>

/**
 * Server → the members in one shard of a group (the envelope's addressee), on the group's topic and again to whoever was away: one epoch of a `sealed` key, wrapped for
 * subsets of the slots (subset-difference/broadcast.ts). `activate`, `nonce`: as in `delivery`; the acknowledgement is asked for here, and is each member's own.
 */
export const Broadcast = z.strictObject({
  type: z.literal('broadcast'),
  generation: place.generation,
  key: KeyId,
  epoch: Epoch,
  nonce: fixed(16),
  activate: z.boolean(),
  wraps: bytes(maxWraps, 32),
})
export type Broadcast = z.infer<typeof Broadcast>

/** Device → server: signed statement of a stage. `proof` (with `active` only) is the MAC under the new key (transcript.ts). */
export const Acknowledge = z.strictObject({
  type: z.literal('acknowledge'),
  key: KeyId,
  epoch: Epoch,
  stage: z.enum(['installed', 'active', 'retired', 'failed']),
  campaign: RowId.nullable(),
  nonce: fixed(16),
  proof: fixed(32).nullable(),
  reason: z.string().max(200).nullable(),
})
export type Acknowledge = z.infer<typeof Acknowledge>

/** Device → server: a new software TLS key. `binding` = LDevID signature over its SPKI hash (transcript.ts). Answered by `identity`. */
export const Renew = z.strictObject({ type: z.literal('renew'), session: fixed(16), csr: bytes(2048, 32), binding: bytes(128, 8) })
export type Renew = z.infer<typeof Renew>

/**
 * Server → device with identity: prove the state you are in now. Answered once, on this connection, by `evidence`. `ima`: first IMA entry wanted, null: none.
 * `firmware`: make a new recipient key under this policy and prove it too.
 */
export const Attest = z.strictObject({
  type: z.literal('attest'),
  challenge: fixed(16),
  random: fixed(32),
  selection: PcrSelection,
  ima: z.int().min(0).max(0xffff_ffff).nullable(),
  firmware: FirmwarePolicy.nullable(),
  expires: time,
})
export type Attest = z.infer<typeof Attest>

/** Device → server: the answer to `attest`; transcript.ts says what the quote and the certifications commit to. `ima.from`: index of the list's first entry. */
export const Evidence = z.strictObject({
  type: z.literal('evidence'),
  challenge: fixed(16),
  quote: attested,
  eventLog: bytes(1 << 20),
  ima: z.strictObject({ from: z.int().min(0).max(0xffff_ffff), list: bytes(2 << 20) }).nullable(),
  recipient: z.strictObject({ public: tpmPublic, certify: attested, srk: attested.nullable() }).nullable(),
})
export type Evidence = z.infer<typeof Evidence>

/** Server → device with identity, on every connection and whenever a release of its model is approved: kept before that firmware is installed, so that no update strands it. */
export const Approvals = z.strictObject({ type: z.literal('approvals'), ...approvalSet })
export type Approvals = z.infer<typeof Approvals>

/**
 * Server → device with identity: whom it believes from now on, in place of its configuration and of every lower version. A device takes a version that is higher
 * than the one it holds, every root of which it trusts already or finds certified by one that it trusts. `tainted`, `retired`: SHA-256 of the SubjectPublicKeyInfo
 * of CAs; nothing that a tainted one vouches for signs a message, nothing of a retired one counts at all. `renewWithin`: seconds over which devices spread the
 * renewal of certificates from such CAs.
 */
export const TrustBundle = z.strictObject({
  type: z.literal('trust'),
  version: z.int().min(1).max(0xffff_ffff),
  roots: z.array(certificate).min(1).max(8),
  chain: z.array(certificate).min(1).max(24),
  keys: z.array(certificate).min(1).max(32),
  tainted: z.array(fixed(32)).max(32),
  retired: z.array(fixed(32)).max(32),
  renewWithin: z.int().min(0).max(2_592_000),
})
export type TrustBundle = z.infer<typeof TrustBundle>

/** Either direction: the next `count` frames (chunks.ts) make up one signed message of `length` bytes with this SHA-256. */
export const Manifest = z.strictObject({
  type: z.literal('manifest'),
  transfer: fixed(16),
  hash: fixed(32),
  length: z
    .int()
    .min(1)
    .max(4 << 20),
  count: z.int().min(1).max(1024),
})
export type Manifest = z.infer<typeof Manifest>

export const Body = z.discriminatedUnion('type', [
  Hello,
  Challenge,
  Answer,
  Identity,
  Refusal,
  Welcome,
  Report,
  Delivery,
  Activate,
  Retire,
  Labels,
  Broadcast,
  Acknowledge,
  Renew,
  Attest,
  Evidence,
  Approvals,
  TrustBundle,
  Manifest,
])
export type Body = z.infer<typeof Body>
export type BodyOf<T extends Body['type']> = Extract<Body, { type: T }>

export const messagesFromDevice = ['hello', 'answer', 'report', 'acknowledge', 'renew', 'evidence', 'manifest'] as const
export const messagesFromServer = [
  'challenge',
  'identity',
  'refusal',
  'welcome',
  'delivery',
  'activate',
  'retire',
  'labels',
  'broadcast',
  'attest',
  'approvals',
  'trust',
  'manifest',
] as const

/** What is signed. `device` is the client id (device id, or `e-…` before there is one), of a broadcast the shard's address; `id` names the request for retries and answers. */
export const Envelope = z.strictObject({
  v: z.literal(1),
  tenant: TenantId,
  device: z.union([DeviceId, EnrolmentId, GroupAddress]),
  from: z.enum(['device', 'server']),
  id: fixed(16),
  seq: z.int().min(0),
  body: Body,
})
export type Envelope = z.infer<typeof Envelope>
