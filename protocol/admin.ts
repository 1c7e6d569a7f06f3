import { z } from 'zod'
import { DeviceId, GroupId, KeyId } from './ids.ts'
import { KeyAlgorithm, Protection } from './messages.ts'
import { maxShares, sealedShareMax } from './share.ts'
import { revocationReasons } from './x509/reasons.ts'

/**
 * The operator's surface: one row per request. The server's routes, its OpenAPI description and the command-line client
 * are all derived from `operations`; a request or an answer is spelled here and nowhere else.
 * Times are milliseconds since 1970 (UTC), bytes are base64 text.
 */
const time = z.int().min(0)
const base64 = (max: number) =>
  z
    .string()
    .max(Math.ceil(max / 3) * 4)
    .regex(/^[A-Za-z0-9+/]*={0,2}$/)
const name = z.string().regex(/^[a-z0-9][a-z0-9-]{0,63}$/)
const page = { after: z.string().max(200).optional(), limit: z.coerce.number().int().min(1).max(1000).default(100) }
const listOf = <T extends z.ZodType>(row: T) => z.strictObject({ items: z.array(row), next: z.string().nullable() })
const ok = z.strictObject({ ok: z.literal(true) })

export const DeviceState = z.enum(['registered', 'enrolled', 'quarantined', 'suspended', 'revoked'])
const deviceCounts = z.strictObject({ registered: z.int(), enrolled: z.int(), quarantined: z.int(), suspended: z.int(), revoked: z.int() })
/** Why, in an operator's words; `code`: the CRLReason of RFC 5280 (what the words name when they are nothing but one, else unspecified, when left out). */
const reason = z.string().min(1).max(200)
const Revocation = z.strictObject({ reason, code: z.enum(revocationReasons).optional() })
const Suspension = z.strictObject({ reason })
const orders = z.strictObject({ already: z.boolean(), keys: z.array(KeyId), campaigns: z.array(z.string()) })
const batchOrders = orders.extend({ devices: z.int() })
/** An order against a whole batch or station. */
const standing = z.strictObject({ at: time, by: z.string(), reason: z.string(), code: z.string() })
export const Assurance = z.enum(['token', 'simulated', 'idevid', 'attested'])
/** How a device proves what it is. */
export const EnrolmentMethod = z.enum(['tpm2', 'idevid', 'token'])
const endorsementPurpose = z.enum(['ek', 'idevid'])
const releaseId = z.string().regex(/^[a-z0-9][a-z0-9-]{0,63}\/[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/)
export const Stage = z.enum(['pending', 'delivered', 'installed', 'active', 'retired', 'failed', 'timed-out', 'already-current', 'left', 'quarantined'])
const counts = z.partialRecord(Stage, z.int().min(0))

const tokenId = z.string().regex(/^[0-9a-f]{32}$/)
export const GenerationState = z.enum(['preparing', 'prepared', 'distributed', 'activating', 'active', 'superseded', 'tainted', 'retiring', 'retired'])
const CaRevocation = z.strictObject({ at: time, by: z.string(), reason: z.string(), code: z.enum(revocationReasons) })
/** The CA, its generations, and how the fleet stands to the newest trust bundle and the CA that is active or to follow. */
export const CaView = z.strictObject({
  /** Of the trust bundle; 1: that of every configuration, which nobody has to acknowledge. */
  version: z.int(),
  generations: z.array(
    z.strictObject({
      number: z.int(),
      root: z.int(),
      state: GenerationState,
      since: time,
      issuing: z.string(),
      notAfter: time.nullable(),
      /** Devices whose certificates in use come from it; null while it is active, and when more than 5,000 such certificates are in force. */
      devices: z.int().nullable(),
      /** Set when it was revoked instead of retired. */
      revoked: CaRevocation.nullable(),
      /** Set while nothing it has issued is accepted, until it is reinstated. */
      suspended: z.strictObject({ at: time, by: z.string(), reason: z.string() }).nullable(),
      /** Device certificates of it that are in force, those that end today included; null while it is active. */
      certificates: z.int().nullable(),
    }),
  ),
  roots: z.array(z.strictObject({ number: z.int(), state: z.enum(['unknown', 'trusted', 'tainted', 'retired']) })),
  readiness: z.strictObject({
    devices: z.int(),
    acknowledged: z.int(),
    waiting: z.int(),
    away: z.int(),
    stranded: z.int(),
    /** When the first of the certificates ends by which devices that are away come back; null when they need none. */
    until: time.nullable(),
    first: z.array(z.strictObject({ device: DeviceId, because: z.enum(['waiting', 'stranded']) })),
  }),
})
/** Kinds of certificates, as the profiles of the server name them. */
export const CertificateProfile = z.enum([
  'root-ca',
  'cross-ca',
  'issuing-ca',
  'server-signing',
  'server-tls',
  'ocsp-responder',
  'device-identity',
  'device-tls',
  'station',
])
/** `suspended`: on hold; `superseded`: good still, its device has another one in its place. */
export const CertificateState = z.enum(['valid', 'superseded', 'suspended', 'revoked', 'expired'])
/** Of a CA: `root`, `issuing`, and of later generations `root-2`, `issuing-2`. */
const issuerName = z.string().regex(/^(root|issuing)(-[1-9]\d{0,5})?$/)
const idPrefix = z.string().regex(/^[a-z0-9][a-z0-9-]{0,63}$/)
export const CertificateSummary = z.strictObject({
  serial: z.string(),
  profile: CertificateProfile,
  issuer: issuerName,
  device: DeviceId.nullable(),
  /** Whose station it is for. */
  station: name.nullable(),
  state: CertificateState,
  notBefore: time,
  notAfter: time,
  revokedAt: time.nullable(),
  reason: z.string().nullable(),
  code: z.string().nullable(),
  /** When another one took its place. */
  replacedAt: time.nullable(),
  /** Hex SHA-256 of the DER. */
  fingerprint: z.string(),
})
/** What the server itself rests on, and until when. `crl`: when the list has to be replaced. */
export const DeadlineView = z.strictObject({ name: z.string(), kind: z.enum(['ca', 'role', 'tls', 'ocsp', 'crl']), at: time })
/** Certificates in force that end within each span, by kind; spans without any are left out. */
export const CalendarView = z.strictObject({
  spans: z.array(
    z.strictObject({
      from: time,
      until: time,
      certificates: z.int(),
      kinds: z.array(z.strictObject({ profile: CertificateProfile, issuer: issuerName, certificates: z.int() })),
    }),
  ),
  own: z.array(DeadlineView),
})
export const AlertView = z.strictObject({
  /** Of the message as well: a receiver drops what it has seen. */
  id: z.string(),
  type: z.enum(['certificate.expiring', 'certificate.expired', 'certificates.expiring', 'crl.stale']),
  subject: z.string(),
  /** When what it is about ends. */
  at: time,
  /** How long before, in milliseconds; null for what is over. */
  mark: z.int().nullable(),
  certificates: z.int().nullable(),
  text: z.string(),
  raisedAt: time,
  /** `dropped`: too many waited for the receiver. */
  state: z.enum(['waiting', 'delivered', 'dropped']),
  deliveredAt: time.nullable(),
})
export const WebhookView = z.strictObject({
  host: z.string(),
  state: z.enum(['working', 'failing', 'dead']),
  /** Since when it fails, and how. */
  since: time.nullable(),
  error: z.string().nullable(),
  waiting: z.int(),
})
/** Where the keys of the server are. `place` of each: `file`, or a word for the kind of its back end. */
export const KmsView = z.strictObject({
  backend: z.string(),
  kek: z.string(),
  /** KEKs that may still have wrapped something. */
  former: z.array(z.string()),
  keys: z.array(z.strictObject({ name: z.string(), purpose: z.string(), place: z.string(), uses: z.int() })),
})
const KekOutcome = z.strictObject({ kek: z.string(), former: z.array(z.string()), rewrapped: z.int(), already: z.boolean() })
export const FindingView = z.strictObject({
  check: z.string(),
  grade: z.enum(['ok', 'warning', 'failure']),
  found: z.string(),
  /** What to do; empty when it is ok. */
  remedy: z.string(),
})
const Outcome = z.strictObject({ generation: z.int(), already: z.boolean(), approval: z.string().nullable() })
const span = z.strictObject({ from: time, until: time.nullable() })
const epochUse = {
  epoch: z.int(),
  state: z.string(),
  heldFrom: time,
  heldUntil: time.nullable(),
  /** When others protected something under it. */
  usedFrom: time.nullable(),
  usedUntil: time.nullable(),
}
/** A key of a blast radius: its newest epochs and the latest topics that it protected under them (`key topics`), and how many more there are. */
const readable = <E extends z.ZodType>(epoch: E) =>
  z.strictObject({
    key: KeyId,
    protection: Protection,
    epochs: z.array(epoch),
    topics: z.array(z.strictObject({ topic: z.string(), from: time, until: time.nullable() })),
    more: z.strictObject({ epochs: z.int(), topics: z.int() }),
  })
/** What many devices together could read, from when to when; null: not over. `limit` and `after` page through the keys. */
const sharedRadius = {
  devices: z.int(),
  states: deviceCounts,
  /** Some of them; how many are connected. */
  first: z.array(DeviceId),
  connected: z.int(),
  /** Messages that wait to be sent to them. */
  waiting: z.int(),
  /** Both topics of each device in `first`: the broker lets a device read no others. */
  topics: z.array(z.string()),
  keyCount: z.int(),
  /** `devices`: how many of them had the epoch; `heldFrom`, `heldUntil`: from when the first, until when the last of them. */
  keys: z.array(readable(z.strictObject({ ...epochUse, devices: z.int() }))),
  next: z.string().nullable(),
}
/** From when the first, until when the last of the devices could connect; null: none ever could. */
const identity = span.nullable()
/** What devices with certificates of one CA could read; `devices`: that have not run out; `connected`: by them. */
export const CaBlastRadiusView = z.strictObject({
  ...sharedRadius,
  generation: z.int(),
  issuing: z.string(),
  serial: z.string(),
  state: GenerationState,
  revoked: CaRevocation.nullable(),
  suspended: z.strictObject({ at: time, by: z.string(), reason: z.string() }).nullable(),
  /** While its certificates let somebody in; null: they do. */
  from: time,
  until: time.nullable(),
  /** Keys that its revocation rotates, by the policies of their groups. */
  rotated: z.array(KeyId),
})
const Forced = z.strictObject({ force: z.strictObject({ reason }).nullable().default(null) })
export const ApprovalView = z.strictObject({
  id: z.string(),
  what: z.string(),
  detail: z.string(),
  reason: z.string(),
  state: z.enum(['waiting', 'granted', 'spent', 'expired']),
  askedBy: z.string(),
  askedAt: time,
  expires: time,
  grantedBy: z.string().nullable(),
})

const suspension = z.strictObject({ at: time, by: z.string(), reason: z.string() })
/** Whose signatures count while it is in force; from when it was issued. */
const stationCertificate = z.strictObject({ serial: z.string(), state: CertificateState, notBefore: time, notAfter: time })
export const StationView = z.strictObject({
  id: name,
  spki: z.string(),
  addedAt: time,
  revoked: standing.nullable(),
  suspended: suspension.nullable(),
  /** The newest one; null: what it signs counts without. */
  certificate: stationCertificate.nullable(),
  /** Devices that it may admit under that certificate, and that it has; null: any number. */
  quota: z.strictObject({ devices: z.int(), admitted: z.int() }).nullable(),
})
/** What a station signed: to be decided about one by one. */
export const StationSigned = z.strictObject({
  batches: z.array(z.strictObject({ id: name, rows: z.int(), importedAt: time, standing: z.enum(['suspended', 'revoked']).nullable() })),
  releases: z.array(z.string()),
})
export const BatchView = z.strictObject({
  id: name,
  station: z.string(),
  rows: z.int(),
  manifestHash: z.string(),
  importedAt: time,
  importedBy: z.string(),
  /** A device that never enrolled may do so until then; null: at any time. */
  claimUntil: time.nullable(),
  standing: standing.extend({ state: z.enum(['suspended', 'revoked']) }).nullable(),
  states: deviceCounts,
})
export const BatchRadiusView = z.strictObject({
  ...sharedRadius,
  identity,
  batch: name,
  station: z.string(),
  standing: standing.extend({ state: z.enum(['suspended', 'revoked']) }).nullable(),
})
/** Of the devices in every batch that a station signed. */
export const StationRadiusView = z.strictObject({
  ...sharedRadius,
  identity,
  station: name,
  revoked: standing.nullable(),
  suspended: suspension.nullable(),
  batches: z.int(),
  releases: z.int(),
  /** Its own, the newest first. */
  certificates: z.array(stationCertificate),
})
export const ReleaseView = z.strictObject({
  id: z.string(),
  model: z.string(),
  name: z.string(),
  number: z.int(),
  debug: z.boolean(),
  pcrs: z.record(z.string(), z.string()),
  /** Digests of files that may run under it; null: it lists none. */
  files: z.int().nullable(),
  importedAt: time,
  withdrawn: z.strictObject({ at: time, reason: z.string() }).nullable(),
})
export const EndorsementView = z.strictObject({
  id: z.string(),
  subject: z.string(),
  test: z.boolean(),
  /** What it vouches for: EKs of TPMs, or IDevIDs of secure elements. */
  for: endorsementPurpose,
  kind: z.enum(['root', 'intermediate']),
  notAfter: time,
  /** When its CRL must be replaced; null: none was imported. */
  crlUntil: time.nullable(),
  importedAt: time,
})
const tpmManufacturer = z.string().regex(/^(\*|id:[0-9A-F]{8})$/)
const tpmFirmware = z.string().regex(/^\d{1,5}\.\d{1,5}(\.\d{1,5}\.\d{1,5})?$/)
const sha256hex = z.string().regex(/^[0-9a-f]{64}$/)
/**
 * What is refused though a CA vouches for it: an EK (SHA-256 of its TPMT_PUBLIC), an IDevID (SHA-256 of its SPKI), a certificate (issuer's endorsement id, serial in hex), a TPM firmware version
 * (`7.85` or `7.85.4555.0`); lowest firmware per manufacturer; firmware updates that were ordered; the only manufacturers allowed (null: the TCG registry).
 */
export const EndorsementPolicyView = z.strictObject({
  deny: z
    .array(
      z.union([
        z.strictObject({ ek: sha256hex }),
        z.strictObject({ idevid: sha256hex }),
        z.strictObject({ issuer: sha256hex, serial: z.string().regex(/^[0-9a-f]{1,40}$/) }),
        z.strictObject({ manufacturer: tpmManufacturer, firmware: tpmFirmware }),
      ]),
    )
    .max(100_000),
  floors: z.array(z.strictObject({ manufacturer: tpmManufacturer, minimum: tpmFirmware })).max(1000),
  updates: z.array(z.strictObject({ from: tpmFirmware, to: tpmFirmware })).max(1000),
  manufacturers: z
    .array(z.string().regex(/^id:[0-9A-F]{8}$/))
    .max(1000)
    .nullable(),
})
/** What a change does to the devices it concerns, judged by what they proved last; `first`: some of those it quarantines, by id. */
export const ImpactView = z.strictObject({
  judged: z.int(),
  quarantines: z.int(),
  first: z.array(z.strictObject({ device: DeviceId, reason: z.string() })),
})
export const OperatorRole = z.enum(['owner', 'operator', 'factory', 'auditor'])
const severity = z.enum(['quarantine', 'warn'])
export const GroupPolicyView = z.strictObject({
  connectionProof: z.boolean(),
  rotateOnLeave: z.boolean(),
  /** Keys are rotated when a device joins, and it reads nothing from before. */
  rotateOnJoin: z.boolean(),
  /** Members read epochs from before they joined. */
  history: z.boolean(),
  /** How sealed keys reach the members: each by itself, or one message for up to 4,096; `auto` by the size of the group. */
  delivery: z.enum(['auto', 'unicast', 'broadcast']),
  /** Members from which `auto` broadcasts. */
  broadcastFrom: z.int().min(1).max(10_000_000),
  /** Share of a shard's slots, lost to members that left, from which its labels are made anew; and after so many seconds. */
  generationShare: z.number().min(0.001).max(0.9),
  generationLife: z.int().min(60).max(315_360_000),
  releases: z.union([z.literal('any'), z.array(releaseId).max(1000)]),
  minimumRelease: z.int().min(0).max(0xffff_ffff),
  onUnknown: severity,
  onWithdrawn: severity,
  onDebug: severity,
  /** The kernel's list of measured files: not asked for; needed; needed, and every file on the release's list. */
  ima: z.enum(['ignored', 'required', 'listed']),
  onUnlisted: severity,
  assurance: Assurance,
  /** Seconds. */
  attestAge: z.int().min(60).max(31_536_000),
  rotateOnQuarantine: z.boolean(),
})
const query = z.string().min(1).max(1_000)
/** Up to 4,096 places that one broadcast reaches: how many were given in the present generation of labels, and since when that is. */
export const ShardView = z.strictObject({ shard: z.int(), generation: z.int(), given: z.int(), openedAt: time })
export const GroupView = z.strictObject({
  id: GroupId,
  createdAt: time,
  members: z.int(),
  policy: GroupPolicyView,
  keys: z.array(KeyId),
  /** Its members are the devices that this asks for; null: those that were added. */
  query: z.string().nullable(),
  shards: z.array(ShardView),
})
export const DeviceSummary = z.strictObject({
  id: DeviceId,
  serial: z.string(),
  model: z.string(),
  batch: z.string(),
  state: DeviceState,
  online: z.boolean(),
  release: z.string().nullable(),
  assurance: z.string().nullable(),
  refusal: z.string().nullable(),
  verdict: z.enum(['affirming', 'warning', 'contraindicated']).nullable(),
  verdictReason: z.string().nullable(),
})
export const HoldingView = z.strictObject({
  key: KeyId,
  epoch: z.int(),
  stage: z.string(),
  deliveredAt: time,
  installedAt: time.nullable(),
  activeAt: time.nullable(),
  retiredAt: time.nullable(),
  reason: z.string().nullable(),
})
export const DeviceView = DeviceSummary.extend({
  registeredAt: time,
  enrolledAt: time.nullable(),
  lastSeenAt: time.nullable(),
  quarantinedAt: time.nullable(),
  verdictDetail: z.string().nullable(),
  /** When the evidence was given that the verdict rests on. */
  verdictAt: time.nullable(),
  claims: z.array(z.strictObject({ name: z.string(), value: z.string() })),
  /** The kernel's list of measured files, as far as the verdict's evidence proves it; null: none was asked for, or none was proven. */
  ima: z
    .strictObject({
      /** Entries since the boot that the quoted PCR 10 confirms, and when. */
      entries: z.int(),
      at: time,
      /** Entries behind the quoted PCR 10. */
      pending: z.int(),
      /** Files that changed while they were measured. */
      violations: z.int(),
      /** Entries whose file the release does not list; 0 when it has no list. */
      unlisted: z.int(),
    })
    .nullable(),
  /** Generation of firmware approvals that the device's keys work under: one more with every release of its model that was withdrawn. Null: keys without firmware policy. */
  keyGeneration: z.strictObject({ keys: z.int().nullable(), current: z.int() }).nullable(),
  suspendedAt: time.nullable(),
  suspensionReason: z.string().nullable(),
  revokedAt: time.nullable(),
  revocationReason: z.string().nullable(),
  revocationCode: z.string().nullable(),
  /** How it enrols, by the manifest. */
  method: EnrolmentMethod,
  /** End of the certificate that it connects with; a renewed one that was not used yet counts only once it was. */
  tlsNotAfter: time.nullable(),
  ldevidNotAfter: time.nullable(),
  /** A renewal whose certificate was not used yet. */
  renewal: z.strictObject({ issuedAt: time, serial: z.string(), notAfter: time.nullable() }).nullable(),
  /** `left`: recoveries that may still begin; `attempts`: certificates of one that is under way. Held: a person decides. */
  recovery: z.strictObject({ left: z.int(), budget: z.int(), days: z.int(), begun: z.array(time), attempts: z.int(), heldAt: time.nullable() }).nullable(),
  ekHash: z.string().nullable(),
  idevidHash: z.string().nullable(),
  /** Whether a TPM measures its firmware, for ever anew; null before it has an identity. */
  measured: z.boolean().nullable(),
  /** The trust bundle that it has acknowledged; null: none, it trusts what its configuration says. */
  trust: z.strictObject({ version: z.int(), at: time }).nullable(),
  certificates: z.array(z.strictObject({ serial: z.string(), profile: z.string(), status: z.string(), notBefore: time, notAfter: time, pem: z.string() })),
  tags: z.record(z.string(), z.string()),
  groups: z.array(GroupId),
  holdings: z.array(HoldingView),
  lastRefusal: z.strictObject({ at: time, code: z.string(), reason: z.string() }).nullable(),
})
export const TokenView = z.strictObject({
  id: tokenId,
  batch: name,
  device: DeviceId.nullable(),
  state: z.enum(['waiting', 'spent', 'revoked', 'expired']),
  createdAt: time,
  createdBy: z.string(),
  expiresAt: time,
  revokedAt: time.nullable(),
  spentAt: time.nullable(),
  spentBy: DeviceId.nullable(),
})
const Proof = z.enum(['delivered', 'installed', 'active'])
/** A topic, or an MQTT filter. */
const topic = z.string().min(1).max(200)
/** From a moment until before another one; until now when left out. */
const windowQuery = { from: z.coerce.number().int().min(0), until: z.coerce.number().int().min(0).optional() }
/** A device that could read what was protected in a window. `then`: it held the epoch within it; `later`: it got it afterwards, and could read a recording. */
export const ReaderView = z.strictObject({
  device: DeviceId,
  key: KeyId,
  epoch: z.int(),
  proof: Proof,
  when: z.enum(['then', 'later']),
  heldFrom: time,
  heldUntil: time.nullable(),
})
/** Members that have proven neither an epoch nor a newer one, and why. A page may be short: there is more as long as `next` is not null. */
export const UnprovenView = z.strictObject({
  epoch: z.int(),
  /** Devices that use it. */
  proven: z.int(),
  items: z.array(
    z.strictObject({
      device: DeviceId,
      stage: z.enum(['not-enrolled', 'quarantined', 'suspended', 'not-entitled', 'pending', 'delivered', 'installed', 'failed']),
      reason: z.string(),
      since: time.nullable(),
      lastSeenAt: time.nullable(),
      online: z.boolean(),
    }),
  ),
  next: z.string().nullable(),
})
/** What a device held at a moment, and what its groups entitled it to. */
export const HeldView = z.strictObject({
  device: DeviceId,
  at: time,
  items: z.array(z.strictObject({ key: KeyId, epoch: z.int(), proof: Proof, state: z.string(), heldFrom: time, heldUntil: time.nullable() })),
  next: z.string().nullable(),
  groups: z.array(GroupId),
  granted: z.array(KeyId),
})
/** What one identity could read, from when to when; null: not over. */
export const BlastRadiusView = z.strictObject({
  device: DeviceId,
  state: DeviceState,
  identity: span.nullable(),
  topics: z.array(z.string()),
  /** `proof`: it was sent; the device signed that it has it; it proved by a MAC that it used it. `heldUntil`: when the device stated that its copy is erased. */
  keys: z.array(readable(z.strictObject({ ...epochUse, proof: Proof }))),
  /** Granted to its groups and never sent to it. */
  notDelivered: z.array(KeyId),
})
/** Milliseconds that an epoch is used to protect before it is rotated by itself; null: until somebody rotates it. */
const originatorUsage = z.int().min(60_000).max(315_360_000_000).nullable()
/** Messages that all holders together may protect under one epoch. */
const usageLimit = z.int().min(1).max(Number.MAX_SAFE_INTEGER).nullable()
export const KeyPolicyInput = z.strictObject({
  recipientUsage: z.int().min(0).max(315_360_000_000).optional(),
  originatorUsage: originatorUsage.optional(),
  usageLimit: usageLimit.optional(),
})
export const KeyView = z.strictObject({
  id: KeyId,
  algorithm: KeyAlgorithm,
  protection: Protection,
  current: z.int(),
  latest: z.int(),
  recipientUsage: z.int(),
  originatorUsage: z.int().nullable(),
  usageLimit: z.int().nullable(),
  /** When the epoch in use is rotated by itself; null: when somebody does. */
  rotatesAt: time.nullable(),
  createdAt: time,
  grants: z.array(GroupId),
  /** Topics and MQTT filters that applications protect with it. */
  topics: z.array(z.string()),
  epochs: z.array(
    z.strictObject({
      epoch: z.int(),
      state: z.string(),
      checkValue: z.string(),
      createdAt: time,
      activatedAt: time.nullable(),
      deactivatedAt: time.nullable(),
      destroyedAt: time.nullable(),
      compromisedAt: time.nullable(),
      /** It is read beyond its recipient-usage period, for devices that have not proven a newer one. */
      overlap: z.boolean(),
      /** Messages protected under it, as its holders have said. */
      used: z.int(),
    }),
  ),
})
const share = z.number().min(0).max(1)
/** Milliseconds. */
const period = z.int().min(0).max(31_536_000_000)
/** When work may be done: so many minutes from `from` (minutes after midnight) on these days of the week (0: Sunday), in a zone that is `offset` minutes ahead of UTC, all the year. */
const Window = z.strictObject({
  from: z.int().min(0).max(1439),
  minutes: z.int().min(1).max(1440),
  days: z.array(z.int().min(0).max(6)).min(1).max(7),
  offset: z.int().min(-840).max(840),
})
/** A share of the targets, or a number of them. */
const WaveEnd = z.union([z.number().gt(0).max(1), z.strictObject({ devices: z.int().min(1).max(100_000_000) })])
/** How a campaign goes about it; docs/campaigns.md. */
const CampaignPolicyView = z.strictObject({
  targets: z.enum(['frozen', 'live']),
  waves: z.array(WaveEnd).min(1).max(20),
  canary: GroupId.nullable(),
  successThreshold: share,
  errorThreshold: share,
  silent: z.enum(['success', 'error', 'neither']),
  advance: z.enum(['automatic', 'manual']),
  soak: period,
  deadline: z.int().min(100).max(31_536_000_000),
  retries: z.int().min(0).max(100),
  concurrency: z.int().min(1).max(100_000_000).nullable(),
  window: Window.nullable(),
  startAt: time.nullable(),
  approval: z.boolean(),
  overlap: z.enum(['patient', 'strict']),
})
/** Devices that the end of the old epoch may cut off, as agreed to (`overlap: 'strict'`). */
const mayCut = z.int().min(0).max(100_000_000).optional()
export const CampaignPolicyInput = CampaignPolicyView.partial()
export const CampaignState = z.enum([
  'preparing',
  'waiting',
  'scheduled',
  'installing',
  'activating',
  'retiring',
  'done',
  'paused',
  'halted',
  'aborted',
  'rolled-back',
])
export const CampaignView = z.strictObject({
  id: z.string(),
  key: KeyId,
  from: z.int(),
  to: z.int(),
  state: CampaignState,
  because: z.string(),
  createdAt: time,
  createdBy: z.string(),
  finishedAt: time.nullable(),
  policy: CampaignPolicyView,
  wave: z.int(),
  waves: z.int(),
  targets: z.int(),
  counts,
  waveCounts: z.array(counts),
  /** What it waits for, and until when at the latest; null: only an event ends it. */
  waitsFor: z.enum(['approval', 'start-time', 'window', 'devices', 'soak', 'person', 'readers', 'stragglers', 'confirmation', 'nothing']),
  until: time.nullable(),
  /** The approval that it was asked for. */
  approval: z.string().nullable(),
  /** Why it halted. */
  halted: z.string().nullable(),
  /** Devices that have not proven the new epoch: those that a strict end of the old one cuts. */
  behind: z.int(),
  /** How many of them may be cut; null: any, since nobody waits after a revocation. */
  mayCut: z.int().nullable(),
})
export const CutView = z.strictObject({ device: DeviceId, because: z.enum(['away', 'behind']), lastSeenAt: time.nullable() })
export const TargetView = z.strictObject({ device: DeviceId, wave: z.int(), stage: Stage, changedAt: time, reason: z.string().nullable() })
export const AuditView = z.strictObject({
  sequence: z.int(),
  at: time,
  caller: z.string(),
  from: z.string(),
  action: z.string(),
  subject: z.string(),
  outcome: z.enum(['done', 'refused']),
  code: z.string().nullable(),
  detail: z.string(),
})
export const StatusView = z.strictObject({
  tenant: z.string(),
  version: z.string(),
  now: time,
  writable: z.boolean(),
  reason: z.string().nullable(),
  connections: z.int(),
  testEndorsements: z.array(z.string()),
  devices: deviceCounts,
  audit: z.strictObject({ size: z.int(), root: z.string() }),
  certificates: z.array(z.strictObject({ name: z.string(), notAfter: time })),
  store: z.string(),
  kms: z.string(),
})
/** What a device needs to know before its first contact; also the file `bundle.json`. */
export const Bundle = z.strictObject({
  server: z.string(),
  tenant: z.string(),
  trust: z.array(z.string()).min(1),
  chain: z.array(z.string()).min(1),
  keys: z.array(z.string()).min(1),
})
export type Bundle = z.infer<typeof Bundle>

/** RFC 9457; `code` is the one word of protocol/problem.ts. */
export const ProblemView = z.object({ type: z.string(), title: z.string(), status: z.int(), code: z.string(), detail: z.string().optional() })

const signed = { content: base64(16 << 20), signature: base64(256), station: name }

/** A set of shares that opens the keys. */
const shareSet = z.string().regex(/^[0-9a-f]{16}$/)
export const SealView = z.strictObject({
  sealed: z.boolean(),
  /** What is missing; null while it is open. */
  reason: z.string().nullable(),
  /** What opens the keys besides shares. */
  ways: z.array(z.enum(['file', 'passphrase'])),
  sets: z.array(
    z.strictObject({
      set: shareSet,
      shares: z.int(),
      threshold: z.int(),
      /** Not yet: whoever asked for it has not said that the shares have arrived. Until then the set before it opens the keys as well. */
      confirmed: z.boolean(),
      /** Once confirmed nothing else opens the keys. */
      only: z.boolean(),
      /** Numbers of the shares that were handed in. */
      gathered: z.array(z.int()),
    }),
  ),
  /** Wrong shares since the keys were last opened by shares. */
  wrong: z.int(),
  /** P-256 point, 65 bytes: shares are sealed to it (HPKE, docs/operations.md). Another at each start of the process that holds the keys. */
  recipient: base64(65),
})

export interface Operation {
  readonly method: 'GET' | 'POST' | 'PUT' | 'DELETE'
  readonly path: string
  readonly summary: string
  /** No token: it tells no secret, or what it is given is the proof. Served also while the server is sealed. */
  readonly open?: true
  readonly query?: z.ZodObject
  readonly body?: z.ZodType
  readonly response: z.ZodType
}

export const operations = {
  status: { method: 'GET', path: '/api/1/status', summary: 'Health, sizes and warnings of the server', response: StatusView },
  doctor: {
    method: 'GET',
    path: '/api/1/doctor',
    summary: 'Check the PKI and what it rests on; each finding with its remedy',
    response: z.strictObject({ findings: z.array(FindingView) }),
  },
  bundle: { method: 'GET', path: '/api/1/bundle', summary: 'What a device needs before its first contact', response: Bundle },

  'station.list': { method: 'GET', path: '/api/1/stations', summary: 'Factory stations', response: listOf(StationView) },
  'station.add': {
    method: 'POST',
    path: '/api/1/stations',
    summary: 'Admit the public key of a factory station',
    body: z.strictObject({ id: name, publicKey: z.string().max(2000) }),
    response: ok,
  },
  'station.show': { method: 'GET', path: '/api/1/stations/{id}', summary: 'One factory station', response: StationView },
  'station.remove': {
    method: 'DELETE',
    path: '/api/1/stations/{id}',
    summary: 'Remove a station: its signatures count no more, its certificates are revoked',
    response: ok,
  },
  'station.certify': {
    method: 'POST',
    path: '/api/1/stations/{id}/certificate',
    summary:
      'Certify the key of a station, for the first time or again: from the first time on, what it signs is imported only while the newest certificate is in force',
    body: z.strictObject({
      /** A certification request by the key of the station, DER or PEM. */
      csr: base64(64 << 10),
      /** How many devices it may admit under this certificate; any number unless given. */
      devices: z.int().min(1).max(100_000_000).optional(),
    }),
    response: z.strictObject({
      serial: z.string(),
      notBefore: time,
      notAfter: time,
      pem: z.string(),
      /** CA certificates that lead to every root that is trusted, PEM. */ chain: z.string(),
    }),
  },
  'station.signed': {
    method: 'GET',
    path: '/api/1/stations/{id}/signed',
    summary: 'What was imported under the signature of a station',
    response: StationSigned,
  },
  'station.blast-radius': {
    method: 'GET',
    path: '/api/1/stations/{id}/blast-radius',
    summary: 'Keys, epochs and topics that the devices a station signed for could read, from when to when',
    query: z.object(page),
    response: StationRadiusView,
  },
  'station.revoke': {
    method: 'POST',
    path: '/api/1/stations/{id}/revoke',
    summary: 'Revoke a station for good: nothing it signed is imported any more, its key never returns; what it signed before',
    body: Revocation,
    response: StationSigned.extend({ already: z.boolean() }),
  },

  'station.suspend': {
    method: 'POST',
    path: '/api/1/stations/{id}/suspend',
    summary: 'Import nothing more that a station signed until it is reinstated; what it signed before',
    body: z.strictObject({ reason }),
    response: StationSigned.extend({ already: z.boolean() }),
  },
  'station.reinstate': {
    method: 'POST',
    path: '/api/1/stations/{id}/reinstate',
    summary: 'Import again what a suspended station signs',
    response: z.strictObject({ already: z.boolean() }),
  },

  'batch.import': {
    method: 'POST',
    path: '/api/1/batches',
    summary: 'Import a signed batch manifest, all rows or none',
    body: z.strictObject({ ...signed, format: z.enum(['json', 'csv']), batch: name.optional(), claimUntil: time.optional() }),
    response: z.strictObject({ batch: name, rows: z.int() }),
  },
  'batch.list': { method: 'GET', path: '/api/1/batches', summary: 'Batches', query: z.object(page), response: listOf(BatchView.omit({ states: true })) },
  'batch.show': { method: 'GET', path: '/api/1/batches/{id}', summary: 'One batch and how far its devices are', response: BatchView },
  'batch.window': {
    method: 'PUT',
    path: '/api/1/batches/{id}/claim-window',
    summary: 'Until when devices of a batch may enrol for the first time',
    body: z.strictObject({ claimUntil: time.nullable() }),
    response: BatchView.omit({ states: true }),
  },
  'batch.preview': {
    method: 'GET',
    path: '/api/1/batches/{id}/preview/{order}',
    summary: 'What `revoke`, `suspend` or `reinstate` would do to a batch; changes nothing',
    response: batchOrders,
  },
  'batch.blast-radius': {
    method: 'GET',
    path: '/api/1/batches/{id}/blast-radius',
    summary: 'Keys, epochs and topics that the devices of a batch could read, from when to when',
    query: z.object(page),
    response: BatchRadiusView,
  },
  'batch.revoke': {
    method: 'POST',
    path: '/api/1/batches/{id}/revoke',
    summary: 'Revoke every device of a batch for good; answers when all is done',
    body: Revocation,
    response: batchOrders,
  },
  'batch.suspend': {
    method: 'POST',
    path: '/api/1/batches/{id}/suspend',
    summary: 'Suspend every device of a batch; answers when all is done',
    body: Suspension,
    response: batchOrders,
  },
  'batch.reinstate': {
    method: 'POST',
    path: '/api/1/batches/{id}/reinstate',
    summary: 'Reinstate the devices that were suspended with their batch',
    response: batchOrders,
  },

  'kms.status': { method: 'GET', path: '/api/1/kms', summary: 'Where the keys of the server are, and which KEK wraps', response: KmsView },
  'kms.rotate-kek': {
    method: 'POST',
    path: '/api/1/kms/rotate-kek',
    summary: 'Make another KEK, where new keys are made now, and wrap with it what the one before has wrapped',
    response: KekOutcome,
  },
  'kms.retire-kek': { method: 'POST', path: '/api/1/kms/retire-kek', summary: 'Destroy the KEK before the present one', response: KekOutcome },
  'ca.status': { method: 'GET', path: '/api/1/ca', summary: 'The CA, its generations, and the readiness of the fleet', response: CaView },
  'certificate.list': {
    method: 'GET',
    path: '/api/1/certificates',
    summary: 'Search the certificates; a page looks at a bounded number of them, so that it may be short, even empty, and `next` goes on',
    query: z.object({
      ...page,
      device: DeviceId.optional(),
      devicePrefix: idPrefix.optional(),
      /** Hex; the whole or how it begins. */
      serial: z
        .string()
        .regex(/^[0-9a-f]{1,40}$/)
        .optional(),
      profile: CertificateProfile.optional(),
      issuer: issuerName.optional(),
      state: CertificateState.optional(),
      batch: name.optional(),
      /** Ends then or later; ends before. */
      expiresFrom: z.coerce.number().int().min(0).max(Number.MAX_SAFE_INTEGER).optional(),
      expiresBefore: z.coerce.number().int().min(0).max(Number.MAX_SAFE_INTEGER).optional(),
    }),
    response: listOf(CertificateSummary),
  },
  'certificate.show': {
    method: 'GET',
    path: '/api/1/certificates/{id}',
    summary: 'One certificate, by its serial (hex)',
    response: CertificateSummary.extend({ pem: z.string(), subject: z.string().nullable(), spkiSha256: z.string() }),
  },
  'certificate.calendar': {
    method: 'GET',
    path: '/api/1/certificate-calendar',
    summary: 'How many certificates in force end per day, week or month (UTC), and what the server itself rests on',
    query: z.object({
      by: z.enum(['day', 'week', 'month']).default('day'),
      /** From the day of the one to the day of the other, milliseconds since 1970; from today, for as long as 60 spans, when left out. */
      from: z.coerce.number().int().min(0).max(253_402_300_799_999).optional(),
      until: z.coerce.number().int().min(0).max(253_402_300_799_999).optional(),
      profile: CertificateProfile.optional(),
      issuer: issuerName.optional(),
    }),
    response: CalendarView,
  },
  'alert.list': {
    method: 'GET',
    path: '/api/1/alerts',
    summary: 'The newest thousand alerts, oldest first, and how the webhook stands',
    response: z.strictObject({ items: z.array(AlertView), webhook: WebhookView.nullable() }),
  },
  'alert.test': {
    method: 'POST',
    path: '/api/1/alerts/test',
    summary: 'Send a test message to the webhook now',
    response: z.strictObject({ taken: z.boolean(), error: z.string().nullable() }),
  },
  'ca.prepare': {
    method: 'POST',
    path: '/api/1/ca/prepare',
    summary: 'Make the next CA, under the present root or a new one',
    body: z.strictObject({ root: z.boolean().default(false) }),
    response: Outcome,
  },
  'ca.distribute': { method: 'POST', path: '/api/1/ca/distribute', summary: 'Tell every device of the next CA', response: Outcome },
  'ca.activate': {
    method: 'POST',
    path: '/api/1/ca/activate',
    summary: 'The next CA signs from now on; refused while a device would be stranded, unless a second person approves',
    body: Forced,
    response: Outcome,
  },
  'ca.taint': {
    method: 'POST',
    path: '/api/1/ca/taint',
    summary: 'Renew every device away from a CA that was superseded, within so many seconds',
    body: z.strictObject({ generation: z.int().min(1).optional(), within: z.int().min(0).max(2_592_000).default(86_400) }),
    response: Outcome,
  },
  'ca.retire': {
    method: 'POST',
    path: '/api/1/ca/retire',
    summary: 'Refuse what a tainted CA has issued and destroy its key; refused while devices depend on it, unless a second person approves',
    body: Forced.extend({ generation: z.int().min(1).optional() }),
    response: Outcome,
  },
  'ca.blast-radius': {
    method: 'GET',
    path: '/api/1/ca/{name}/blast-radius',
    summary: 'What stands behind an issuing CA: devices, keys and topics, from when to when. By generation, name of its lists, or serial',
    query: z.object(page),
    response: CaBlastRadiusView,
  },
  'ca.revoke': {
    method: 'POST',
    path: '/api/1/ca/{name}/revoke',
    summary: 'Revoke an issuing CA for good: cut what rests on it, list it, rotate keys; a second person approves. `force`: although it is the one that signs',
    body: z.strictObject({ reason, code: z.enum(revocationReasons).optional(), force: z.boolean().default(false) }),
    response: Outcome.extend({ keys: z.array(KeyId), campaigns: z.array(z.string()) }),
  },
  'ca.suspend': {
    method: 'POST',
    path: '/api/1/ca/{name}/suspend',
    summary: 'Accept nothing that an issuing CA which signs no more has issued, until it is reinstated; connections over its certificates are cut',
    body: z.strictObject({ reason }),
    response: Outcome,
  },
  'ca.reinstate': {
    method: 'POST',
    path: '/api/1/ca/{name}/reinstate',
    summary: 'Accept again what a suspended CA has issued',
    response: Outcome,
  },
  'seal.status': { method: 'GET', path: '/api/1/seal', summary: 'Whether the keys are open, and what opens them', open: true, response: SealView },
  'seal.unseal': {
    method: 'POST',
    path: '/api/1/seal/shares',
    summary: 'Hand in one share; `reset` forgets those that were handed in before',
    open: true,
    body: z.strictObject({ share: base64(sealedShareMax), reset: z.boolean().default(false) }),
    response: SealView,
  },
  'seal.split': {
    method: 'POST',
    path: '/api/1/seal/sets',
    summary: 'Make a new set of shares, sealed to the key of whoever asks, once a second person has approved; it counts when it is confirmed',
    body: z
      .strictObject({
        shares: z.int().min(2).max(maxShares),
        threshold: z.int().min(2).max(maxShares),
        only: z.boolean().default(false),
        reason,
        recipient: base64(65),
      })
      .refine(({ shares, threshold }) => threshold <= shares, 'more shares are asked for than there are'),
    response: z.strictObject({ set: shareSet.nullable(), shares: z.array(base64(sealedShareMax)), approval: z.string().nullable() }),
  },
  'seal.confirm': {
    method: 'POST',
    path: '/api/1/seal/sets/{id}/confirm',
    summary: 'The shares of a set have arrived: sets before it open nothing any more',
    response: SealView,
  },
  'approval.list': {
    method: 'GET',
    path: '/api/1/approvals',
    summary: 'What waits for a second person',
    response: z.strictObject({ items: z.array(ApprovalView) }),
  },
  'approval.grant': { method: 'POST', path: '/api/1/approvals/{id}/grant', summary: 'Approve what another operator has asked for', response: ApprovalView },
  'operator.list': {
    method: 'GET',
    path: '/api/1/operators',
    summary: 'Operators and their roles, never their tokens',
    response: listOf(z.strictObject({ id: name, roles: z.array(OperatorRole), createdAt: time, expiresAt: time.nullable() })),
  },
  'operator.remove': {
    method: 'DELETE',
    path: '/api/1/operators/{id}',
    summary: 'Take the token of an operator back, with every approval of theirs that was not used',
    response: ok,
  },
  'operator.add': {
    method: 'POST',
    path: '/api/1/operators',
    summary: 'Another operator; the token is shown this once',
    body: z.strictObject({
      id: name,
      roles: z.array(OperatorRole).min(1).max(4),
    }),
    response: z.strictObject({ id: name, token: z.string() }),
  },
  'release.import': {
    method: 'POST',
    path: '/api/1/releases',
    summary: 'Import signed reference values of a firmware release',
    body: z.strictObject(signed),
    response: z.strictObject({ id: z.string() }),
  },
  'release.list': { method: 'GET', path: '/api/1/releases', summary: 'Releases', query: z.object(page), response: listOf(ReleaseView) },

  'release.preview': {
    method: 'GET',
    path: '/api/1/releases/{model}/{name}/preview',
    summary: 'What withdrawing a release would do to the devices of its model',
    response: ImpactView,
  },
  'release.withdraw': {
    method: 'POST',
    path: '/api/1/releases/{model}/{name}/withdraw',
    summary: 'Withdraw a release: devices that run it are quarantined unless their policy only warns',
    body: z.strictObject({ reason: z.string().min(1).max(200) }),
    response: ImpactView,
  },

  'endorsement.import': {
    method: 'POST',
    path: '/api/1/endorsements',
    summary:
      'Trust the CAs of a PEM bundle (certificates, CRLs) that vouch for EKs, or for IDevIDs; `test` admits a simulator, is audited and shown in every report',
    body: z.strictObject({ certificate: z.string().max(2 << 20), test: z.boolean(), for: endorsementPurpose.optional() }),
    response: z.strictObject({ id: z.string(), roots: z.int(), intermediates: z.int(), crls: z.int() }),
  },
  'endorsement.list': {
    method: 'GET',
    path: '/api/1/endorsements',
    summary: 'Trusted CAs of EKs and IDevIDs',
    query: z.object(page),
    response: listOf(EndorsementView),
  },
  'endorsement.remove': {
    method: 'DELETE',
    path: '/api/1/endorsements/{id}',
    summary: 'Trust a CA no more; how many devices rest on it. With `dryRun` only that',
    query: z.object({ dryRun: z.enum(['true', 'false']).default('false') }),
    response: z.strictObject({ devices: z.int() }),
  },
  'endorsement.policy.get': {
    method: 'GET',
    path: '/api/1/endorsement-policy',
    summary: 'Deny list, TPM firmware floors and updates, allowed manufacturers',
    response: EndorsementPolicyView,
  },
  'endorsement.policy.set': {
    method: 'PUT',
    path: '/api/1/endorsement-policy',
    summary: 'Replace the parts of the endorsement policy that are given',
    body: EndorsementPolicyView.partial(),
    response: EndorsementPolicyView,
  },

  'token.create': {
    method: 'POST',
    path: '/api/1/tokens',
    summary: 'Make single-use enrolment tokens for boards of a batch; each is shown this once',
    /** `validFor`: milliseconds. */
    body: z.strictObject({
      batch: name,
      device: DeviceId.optional(),
      count: z.int().min(1).max(10_000).default(1),
      validFor: z.int().min(1000).max(31_622_400_000),
    }),
    response: z.strictObject({ tokens: z.array(z.strictObject({ id: tokenId, token: z.string(), expiresAt: time })) }),
  },
  'token.list': {
    method: 'GET',
    path: '/api/1/tokens',
    summary: 'Enrolment tokens, never the tokens themselves',
    query: z.object({ ...page, batch: name.optional() }),
    response: listOf(TokenView),
  },
  'token.revoke': { method: 'DELETE', path: '/api/1/tokens/{id}', summary: 'Revoke a token that nobody has used', response: ok },

  'group.create': {
    method: 'POST',
    path: '/api/1/groups',
    summary: 'Create a group of devices',
    body: z.strictObject({ id: GroupId, query: query.optional() }),
    response: ok,
  },
  'group.query': {
    method: 'PUT',
    path: '/api/1/groups/{id}/query',
    summary: 'Have the members of a group follow a query, such as batch=B1 AND tag.site=berlin; null: add and remove them by hand',
    body: z.strictObject({ query: query.nullable() }),
    response: GroupView,
  },
  'group.list': { method: 'GET', path: '/api/1/groups', summary: 'Groups', query: z.object(page), response: listOf(GroupView) },
  'group.show': { method: 'GET', path: '/api/1/groups/{id}', summary: 'One group', response: GroupView },
  'group.members': {
    method: 'GET',
    path: '/api/1/groups/{id}/members',
    summary: 'Members of a group',
    query: z.object(page),
    response: listOf(z.strictObject({ device: DeviceId, joinedAt: time })),
  },
  'group.add': {
    method: 'POST',
    path: '/api/1/groups/{id}/members',
    summary: 'Add devices, or every device of a batch',
    body: z.strictObject({ devices: z.array(DeviceId).max(10_000).optional(), batch: name.optional() }),
    response: z.strictObject({ added: z.int(), already: z.int() }),
  },
  'group.remove': {
    method: 'DELETE',
    path: '/api/1/groups/{id}/members/{device}',
    summary: 'Remove a device; its keys are rotated when the policy says so',
    response: ok,
  },
  'group.policy.get': { method: 'GET', path: '/api/1/groups/{id}/policy', summary: 'Policy of a group', response: GroupPolicyView },
  'group.policy.set': {
    method: 'PUT',
    path: '/api/1/groups/{id}/policy',
    summary: 'Change the policy of a group',
    body: GroupPolicyView.partial(),
    response: GroupPolicyView,
  },

  'group.policy.preview': {
    method: 'POST',
    path: '/api/1/groups/{id}/policy/preview',
    summary: 'What a change of policy would do to the members; changes nothing',
    body: GroupPolicyView.partial(),
    response: ImpactView,
  },

  'device.list': {
    method: 'GET',
    path: '/api/1/devices',
    summary: 'Devices',
    query: z.object({ ...page, state: DeviceState.optional(), batch: name.optional() }),
    response: listOf(DeviceSummary),
  },
  'device.show': { method: 'GET', path: '/api/1/devices/{id}', summary: 'One device: identity, keys it holds, why it was refused last', response: DeviceView },
  'device.preview': {
    method: 'GET',
    path: '/api/1/devices/{id}/preview/{order}',
    summary: 'What `revoke`, `suspend` or `reinstate` would do to a device; changes nothing',
    response: orders,
  },
  'device.revoke': {
    method: 'POST',
    path: '/api/1/devices/{id}/revoke',
    summary: 'Revoke for good: live session cut, certificates refused, keys of its groups rotated without it',
    body: Revocation,
    response: orders,
  },
  'device.suspend': {
    method: 'POST',
    path: '/api/1/devices/{id}/suspend',
    summary: 'Suspend: live session cut, certificates on hold, no keys, until it is reinstated; keys of groups that rotate on leave are rotated',
    body: Suspension,
    response: orders,
  },
  'device.reinstate': {
    method: 'POST',
    path: '/api/1/devices/{id}/reinstate',
    summary: 'End a suspension: it connects and converges',
    response: z.strictObject({ already: z.boolean() }),
  },
  'device.blast-radius': {
    method: 'GET',
    path: '/api/1/devices/{id}/blast-radius',
    summary: 'Keys, epochs and topics that this identity could read, from when to when',
    response: BlastRadiusView,
  },

  'device.held': {
    method: 'GET',
    path: '/api/1/devices/{id}/held',
    summary: 'What a device held at a moment (now), and what it was entitled to',
    query: z.object({ ...page, at: z.coerce.number().int().min(0).optional() }),
    response: HeldView,
  },
  'revocation.preview': {
    method: 'GET',
    path: '/api/1/revocation/{what}/{id}',
    summary: 'Keys that revoking a `device`, a `batch`, all of a `station` or of a `ca` (number of its generation) would rotate; changes nothing',
    response: z.strictObject({ keys: z.array(KeyId), groups: z.array(GroupId), devices: z.int().nullable() }),
  },

  'device.recover': {
    method: 'POST',
    path: '/api/1/devices/{id}/recover',
    summary: 'Let a device prove itself anew again: its recovery budget is whole',
    body: z.strictObject({ reason: z.string().min(1).max(200) }),
    response: z.strictObject({ held: z.boolean() }),
  },

  'device.tag': {
    method: 'PUT',
    path: '/api/1/devices/{id}/tags',
    summary: 'Set tags of a device; null takes one away',
    body: z.strictObject({ tags: z.record(z.string().max(32), z.string().max(64).nullable()) }),
    response: z.strictObject({ tags: z.record(z.string(), z.string()) }),
  },
  'device.attest': {
    method: 'POST',
    path: '/api/1/devices/{id}/attest',
    summary: 'Ask a device to attest now; one that is offline is asked when it next connects',
    response: z.strictObject({ asked: z.enum(['asked', 'offline']) }),
  },

  'key.create': {
    method: 'POST',
    path: '/api/1/keys',
    summary: 'Create a managed key with its first epoch',
    body: z.strictObject({
      id: KeyId,
      protection: Protection,
      algorithm: KeyAlgorithm.optional(),
      recipientUsage: z.int().min(0).max(315_360_000_000).optional(),
      originatorUsage: originatorUsage.optional(),
      usageLimit: usageLimit.optional(),
    }),
    response: z.strictObject({ id: KeyId, epoch: z.int() }),
  },
  'key.policy.set': {
    method: 'PUT',
    path: '/api/1/keys/{id}/policy',
    summary: 'Change the cryptoperiod and the usage limit of a key; what is left out stays',
    body: KeyPolicyInput,
    response: KeyView,
  },
  'key.list': { method: 'GET', path: '/api/1/keys', summary: 'Managed keys', query: z.object(page), response: listOf(KeyView) },
  'key.show': { method: 'GET', path: '/api/1/keys/{id}', summary: 'One key with its epochs', response: KeyView },
  'key.grant': {
    method: 'POST',
    path: '/api/1/keys/{id}/grants',
    summary: 'Let the members of a group hold a key',
    body: z.strictObject({ group: GroupId, history: z.boolean().optional() }),
    response: z.strictObject({ devices: z.int() }),
  },
  'key.topics': {
    method: 'PUT',
    path: '/api/1/keys/{id}/topics',
    summary: 'Say which topics (or MQTT filters) applications protect with a key, from now on',
    body: z.strictObject({ topics: z.array(topic).max(64) }),
    response: KeyView,
  },
  'key.unproven': {
    method: 'GET',
    path: '/api/1/keys/{id}/unproven',
    summary: 'Members that have proven neither an epoch (the newest) nor a newer one, and why',
    query: z.object({ ...page, epoch: z.coerce.number().int().min(1).optional() }),
    response: UnprovenView,
  },
  'key.readers': {
    method: 'GET',
    path: '/api/1/keys/{id}/readers',
    summary: 'Devices that could read what a key protected in a window of time, then or later',
    query: z.object({ ...page, ...windowQuery }),
    response: listOf(ReaderView),
  },
  'topic.readers': {
    method: 'GET',
    path: '/api/1/topic-readers',
    summary: 'Devices that could read a topic in a window of time, by the keys that protected it then',
    query: z.object({ ...page, ...windowQuery, topic }),
    response: listOf(ReaderView),
  },
  'key.rotate': {
    method: 'POST',
    path: '/api/1/keys/{id}/rotate',
    summary: 'Rotate: a new epoch, a campaign',
    body: CampaignPolicyInput.extend({ mayCut }),
    response: z.strictObject({ campaign: z.string(), epoch: z.int() }),
  },
  'key.compromised': {
    method: 'POST',
    path: '/api/1/keys/{id}/compromised',
    summary: 'The epoch in use is in other hands: it is compromised from now on, and replaced at once',
    body: z.strictObject({ reason }),
    response: z.strictObject({ campaign: z.string(), epoch: z.int() }),
  },

  'campaign.create': {
    method: 'POST',
    path: '/api/1/campaigns',
    summary: 'Bring every device to the epoch in use, without a new one; those that have proven it are already current',
    body: CampaignPolicyInput.extend({ key: KeyId }),
    response: z.strictObject({ campaign: z.string(), epoch: z.int() }),
  },
  'campaign.preview': {
    method: 'GET',
    path: '/api/1/keys/{id}/rotation-preview',
    summary: 'Devices that a rotation of a key concerns, and those that a strict end of the old epoch could cut off, as things stand',
    query: z.object(page),
    response: listOf(CutView).extend({ devices: z.int(), count: z.int() }),
  },
  'campaign.list': {
    method: 'GET',
    path: '/api/1/campaigns',
    summary: 'Campaigns, newest last',
    query: z.object({ ...page, key: KeyId.optional() }),
    response: listOf(CampaignView),
  },
  'campaign.show': { method: 'GET', path: '/api/1/campaigns/{id}', summary: 'One campaign', response: CampaignView },
  'campaign.targets': {
    method: 'GET',
    path: '/api/1/campaigns/{id}/targets',
    summary: 'Devices of a campaign',
    query: z.object({ ...page, stage: Stage.optional(), behind: z.enum(['true', 'false']).optional() }),
    response: listOf(TargetView),
  },
  'campaign.pause': { method: 'POST', path: '/api/1/campaigns/{id}/pause', summary: 'Pause', response: CampaignView },
  'campaign.resume': {
    method: 'POST',
    path: '/api/1/campaigns/{id}/resume',
    summary: 'Resume what is paused or halted; one that halted halts again unless its devices were tried again or the threshold is another',
    body: z.strictObject({ errorThreshold: share.optional() }),
    response: CampaignView,
  },
  'campaign.approve': {
    method: 'POST',
    path: '/api/1/campaigns/{id}/approve',
    summary: 'Approve a campaign that another operator has ordered',
    response: CampaignView,
  },
  'campaign.advance': {
    method: 'POST',
    path: '/api/1/campaigns/{id}/advance',
    summary: 'Let a campaign with manual waves pass the newest one',
    response: CampaignView,
  },
  'campaign.confirm': {
    method: 'POST',
    path: '/api/1/campaigns/{id}/confirm',
    summary: 'Agree that so many devices lose the old epoch without having proven the new one',
    body: z.strictObject({ devices: z.int().min(0).max(100_000_000) }),
    response: CampaignView,
  },
  'campaign.retry': {
    method: 'POST',
    path: '/api/1/campaigns/{id}/retry',
    summary: 'Try the devices again that failed or were given up; a campaign that stands still goes on',
    response: CampaignView,
  },
  'campaign.rollback': {
    method: 'POST',
    path: '/api/1/campaigns/{id}/rollback',
    summary: 'Take back a campaign that halted or is paused; the campaign in charge then',
    response: CampaignView,
  },
  'campaign.abort': {
    method: 'POST',
    path: '/api/1/campaigns/{id}/abort',
    summary: 'Abort: what is installed stays readable, nothing more is sent',
    response: CampaignView,
  },

  'audit.list': {
    method: 'GET',
    path: '/api/1/audit',
    summary: 'Audit entries',
    query: z.object({ after: z.coerce.number().int().min(0).default(0), limit: page.limit, device: z.string().max(100).optional() }),
    response: listOf(AuditView),
  },
  'audit.key': {
    method: 'GET',
    path: '/api/1/audit/key',
    summary: 'Public key that signs checkpoints',
    response: z.strictObject({ origin: z.string(), spki: z.string() }),
  },
} as const satisfies Readonly<Record<string, Operation>>

export type OperationName = keyof typeof operations
type Of<N extends OperationName> = (typeof operations)[N]
export type BodyIn<N extends OperationName> = Of<N> extends { body: infer B extends z.ZodType } ? z.input<B> : undefined
export type BodyOut<N extends OperationName> = Of<N> extends { body: infer B extends z.ZodType } ? z.output<B> : undefined
export type QueryIn<N extends OperationName> = Of<N> extends { query: infer Q extends z.ZodType } ? z.input<Q> : undefined
export type QueryOut<N extends OperationName> = Of<N> extends { query: infer Q extends z.ZodType } ? z.output<Q> : undefined
export type ResponseOf<N extends OperationName> = z.output<Of<N>['response']>
export type ParamsOf<N extends OperationName> = Readonly<Record<ParamNames<Of<N>['path']>, string>>
type ParamNames<P extends string> = P extends `${string}{${infer Name}}${infer Rest}` ? Name | ParamNames<Rest> : never
