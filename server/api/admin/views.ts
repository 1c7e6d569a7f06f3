import { approvalState, type Approval } from '../../access/approval.ts'
import { CertificateProfile, type ResponseOf } from '@fleetkey/protocol/admin.ts'
import type { GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { parseCrl } from '@fleetkey/protocol/x509/crl.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { recordedState } from '../../attestation/claims.ts'
import type { SequencedEntry } from '../../audit/entry.ts'
import { stages, type Campaign, type Stage, type Target } from '../../campaigns/campaign.ts'
import { keyGenerationOf } from '../../flows/approvals.ts'
import type { BatchEffect } from '../../flows/batch-order.ts'
import type { BlastRadius } from '../../flows/blast-radius.ts'
import type { ReadableKey } from '../../flows/readable-key.ts'
import type { SharedRadius } from '../../flows/shared-radius.ts'
import type { CaBlastRadius } from '../../flows/under-ca.ts'
import { deliveryPolicyOf, shardsOf } from '../../flows/broadcast.ts'
import { topicSpans } from '../../flows/key-topics.ts'
import { tagsOf } from '../../flows/group-query.ts'
import type { Context, Query, Table, Tables } from '../../flows/context.ts'
import { hasIdentity, isMeasured, type Batch, type Device, type Endorsement, type Group, type Release, type Station } from '../../fleet/device.ts'
import type { EnrolmentToken } from '../../fleet/enrolment-token.ts'
import { wholePolicy } from '../../fleet/policy.ts'
import { recoveriesLeft } from '../../fleet/recovery.ts'
import { issuerKeyOf, stateOf, type Certificate } from '../../ca/certificate.ts'
import { alertText, type Deadline } from '../../ca/alerts.ts'
import type { WebhookHealth } from '../alerts.ts'
import type { RaisedAlert } from '../../flows/alerts.ts'
import type { CalendarSpan } from '../../flows/calendar.ts'
import { sha256hex } from '../../flows/message.ts'
import { authorityName } from '../../flows/status-lists.ts'
import type { Impact } from '../../flows/reappraise.ts'
import type { Effect } from '../../flows/revoke.ts'
import { behindOf, countsOf, stepOf } from '../../flows/campaign.ts'
import type { SignedByStation } from '../../flows/station.ts'
import { usedOf } from '../../flows/usage.ts'
import { rotatesAt } from '../../keys/cryptoperiod.ts'
import type { ManagedKey } from '../../keys/key.ts'

/** Rows as operators see them: no key material, no ciphertext. */
type Item<N extends 'token.list' | 'station.list' | 'release.list' | 'endorsement.list' | 'device.list' | 'batch.list' | 'campaign.targets' | 'audit.list'> =
  ResponseOf<N>['items'][number]

const base64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64')

/** One page of a table: rows and the cursor of the next page. */
export const pageOf = async <T extends Table, V>(
  ctx: Context,
  table: T,
  query: Query<T>,
  view: (row: Tables[T]) => V | Promise<V>,
): Promise<{ items: V[]; next: string | null }> => {
  const rows = await ctx.store.find(table, { ...query, limit: query.limit + 1 })
  const shown = rows.slice(0, query.limit)
  return { items: await Promise.all(shown.map(view)), next: rows.length > query.limit ? (shown.at(-1)?.id ?? null) : null }
}

/** Every row of a search that is known to be small (epochs of a key, groups of a device). */
export const allOf = async <T extends Table>(ctx: Context, table: T, where: NonNullable<Query<T>['where']>): Promise<readonly Tables[T][]> =>
  await ctx.store.find(table, { where, limit: 10_000 })

/** `certificate`: its newest one. */
export const stationView = (station: Station, certificate: Certificate | undefined, now: number): Item<'station.list'> => ({
  id: station.id,
  spki: base64(station.spki),
  addedAt: station.addedAt,
  revoked: station.revoked ?? null,
  suspended: station.suspended ?? null,
  certificate: certificate === undefined ? null : stationCertificateView(certificate, now),
  quota: station.quota === undefined ? null : { devices: station.quota.devices, admitted: station.quota.admitted },
})

export const stationCertificateView = (certificate: Certificate, now: number) => ({
  serial: certificate.id,
  state: stateOf(certificate, now),
  notBefore: certificate.notBefore,
  notAfter: certificate.notAfter,
})

export const signedView = ({ batches, releases }: SignedByStation): ResponseOf<'station.signed'> => ({
  batches: batches.map(({ id, rows, importedAt, standing }) => ({ id, rows, importedAt, standing: standing?.state ?? null })),
  releases: [...releases],
})

export const batchRow = ({ id, station, rows, manifestHash, importedAt, importedBy, claimUntil = null, standing }: Batch): Item<'batch.list'> => ({
  id,
  station,
  rows,
  manifestHash,
  importedAt,
  importedBy,
  claimUntil,
  standing: standing ?? null,
})

/** What an order did: arrays of its own. */
export const effectView = <E extends Effect | BatchEffect>(effect: E): E & { keys: KeyId[]; campaigns: string[] } => ({
  ...effect,
  keys: [...effect.keys],
  campaigns: [...effect.campaigns],
})

/** A key of a blast radius: arrays of its own. */
const readableView = <E>({ key, protection, epochs, topics, more }: ReadableKey<E>) => ({ key, protection, epochs: [...epochs], topics: [...topics], more })

export const blastRadiusView = ({ topics, keys, notDelivered, ...rest }: BlastRadius): ResponseOf<'device.blast-radius'> => ({
  ...rest,
  topics: [...topics],
  keys: keys.map(readableView),
  notDelivered: [...notDelivered],
})

/** What many could read: arrays of its own. */
export const sharedRadiusView = <R extends Omit<SharedRadius, 'identity'>>({ first, topics, keys, ...rest }: R) => ({
  ...rest,
  first: [...first],
  topics: [...topics],
  keys: keys.map(readableView),
})

export const caBlastRadiusView = ({ rotated, ...rest }: CaBlastRadius): ResponseOf<'ca.blast-radius'> => ({ ...sharedRadiusView(rest), rotated: [...rotated] })

export const releaseView = ({ id, model, name, number, debug, pcrs, files, importedAt, withdrawn }: Release): Item<'release.list'> => ({
  id,
  model,
  name,
  number,
  debug,
  pcrs,
  files: files ?? null,
  importedAt,
  withdrawn,
})

export const impactView = ({ first, ...counts }: Impact): ResponseOf<'release.withdraw'> => ({ ...counts, first: [...first] })

/** A policy as the API gives it: arrays of its own. */
export const policyView = (group: Group): ResponseOf<'group.policy.get'> => {
  const { releases, ...policy } = wholePolicy(group.policy)
  return { ...policy, releases: releases === 'any' ? releases : [...releases], ...deliveryPolicyOf(group) }
}

export const endorsementView = ({ id, subject, purpose, test, intermediate, certificate, crl, importedAt }: Endorsement): Item<'endorsement.list'> => ({
  id,
  subject,
  test,
  for: purpose ?? 'ek',
  kind: intermediate === true ? 'intermediate' : 'root',
  notAfter: parseCertificate(certificate).notAfter,
  crlUntil: crl === undefined ? null : parseCrl(crl).nextUpdate,
  importedAt,
})

export const groupView = async (ctx: Context, group: Group): Promise<ResponseOf<'group.show'>> => ({
  id: group.id,
  createdAt: group.createdAt,
  members: await ctx.store.count('member', { group: group.id }),
  policy: policyView(group),
  keys: (await allOf(ctx, 'grant', { group: group.id })).map(({ key }) => key),
  query: group.query ?? null,
  shards: (await shardsOf(ctx, group.id)).map(({ shard, generation, given, openedAt }) => ({ shard, generation, given, openedAt })),
})

export const deviceSummary = (ctx: Context, device: Device): Item<'device.list'> => ({
  id: device.id,
  serial: device.serial,
  model: device.model,
  batch: device.batch,
  state: device.state,
  online: ctx.bus.online(device.id),
  release: hasIdentity(device) ? device.release : null,
  assurance: hasIdentity(device) ? device.assurance : null,
  refusal: device.lastRefusal === null ? null : device.lastRefusal.reason,
  verdict: hasIdentity(device) ? device.verdict.verdict : null,
  verdictReason: hasIdentity(device) ? device.verdict.reason : null,
})

/** What its last accepted evidence proves of the kernel's list of measured files. */
const imaView = (device: Device): ResponseOf<'device.show'>['ima'] => {
  const ima = hasIdentity(device) ? recordedState(device.verdict.claims)?.ima : undefined
  if (!hasIdentity(device) || ima === undefined || ima === null) return null
  const { entries, pending, violations, unlisted } = ima
  return { entries, at: device.verdict.at, pending, violations, unlisted }
}

/** What the manifest says of a device's hardware. */
const hardwareView = (hardware: string): Pick<ResponseOf<'device.show'>, 'method' | 'ekHash' | 'idevidHash'> => {
  if (hardware.startsWith('serial/')) return { method: 'token', ekHash: null, idevidHash: null }
  if (hardware.startsWith('idevid/')) return { method: 'idevid', ekHash: null, idevidHash: hardware.slice('idevid/'.length) }
  return { method: 'tpm2', ekHash: hardware === '' ? null : hardware, idevidHash: null }
}

const tokenState = ({ spent, revokedAt, expiresAt }: EnrolmentToken, now: number): Item<'token.list'>['state'] => {
  if (spent !== null) return 'spent'
  if (revokedAt !== null) return 'revoked'
  return expiresAt <= now ? 'expired' : 'waiting'
}

export const tokenView = (token: EnrolmentToken, now: number): Item<'token.list'> => {
  const { id, batch, device, createdAt, createdBy, expiresAt, revokedAt, spent } = token
  const state = tokenState(token, now)
  return { id, batch, device, state, createdAt, createdBy, expiresAt, revokedAt, spentAt: spent?.at ?? null, spentBy: spent?.device ?? null }
}

/** How long its certificates last, what is under way to replace them, and what is left when none lasts. */
const lifeView = (
  ctx: Context,
  device: Device,
  certificates: readonly Certificate[],
): Pick<ResponseOf<'device.show'>, 'tlsNotAfter' | 'ldevidNotAfter' | 'renewal' | 'recovery'> => {
  if (!hasIdentity(device)) return { tlsNotAfter: null, ldevidNotAfter: null, renewal: null, recovery: null }
  const { recovery, renewal, tlsSerial, previousTlsSerial } = device
  const endOf = (serial: string): number | null => certificates.find(({ id }) => id === serial)?.notAfter ?? null
  const isUnderWay = renewal?.serial === tlsSerial && previousTlsSerial !== null
  const { count, window } = ctx.recoveries
  return {
    tlsNotAfter: endOf(isUnderWay ? previousTlsSerial : tlsSerial),
    ldevidNotAfter: endOf(device.ldevidSerial),
    renewal: isUnderWay ? { issuedAt: renewal.issuedAt, serial: renewal.serial, notAfter: endOf(renewal.serial) } : null,
    recovery: {
      left: recoveriesLeft(recovery, ctx.recoveries, ctx.now()),
      budget: count,
      days: window / 86_400_000,
      begun: [...(recovery?.begun ?? [])],
      attempts: recovery?.attempts ?? 0,
      heldAt: recovery?.heldAt ?? null,
    },
  }
}

export const deviceView = async (ctx: Context, device: Device): Promise<ResponseOf<'device.show'>> => {
  const [certificates, members, holdings, manifest] = await Promise.all([
    allOf(ctx, 'certificate', { device: device.id }),
    allOf(ctx, 'member', { device: device.id }),
    allOf(ctx, 'holding', { device: device.id }),
    allOf(ctx, 'manifest', { device: device.id }),
  ])
  return {
    ...deviceSummary(ctx, device),
    registeredAt: device.registeredAt,
    enrolledAt: hasIdentity(device) ? device.enrolledAt : null,
    lastSeenAt: hasIdentity(device) ? device.lastSeenAt : null,
    quarantinedAt: device.state === 'quarantined' ? device.quarantinedAt : null,
    verdictDetail: hasIdentity(device) ? device.verdict.detail : null,
    verdictAt: hasIdentity(device) ? device.verdict.at : null,
    claims: hasIdentity(device) ? device.verdict.claims.map(({ name, value }) => ({ name, value })) : [],
    ima: imaView(device),
    keyGeneration: hasIdentity(device) ? await keyGenerationOf(ctx, device) : null,
    suspendedAt: device.state === 'suspended' ? device.suspendedAt : null,
    suspensionReason: device.state === 'suspended' ? device.reason : null,
    revokedAt: device.state === 'revoked' ? device.revokedAt : null,
    revocationReason: device.state === 'revoked' ? device.reason : null,
    revocationCode: device.state === 'revoked' ? (device.code ?? null) : null,
    ...hardwareView(manifest[0]?.id ?? ''),
    measured: hasIdentity(device) ? isMeasured(device) : null,
    trust: hasIdentity(device) ? (device.trust ?? null) : null,
    ...lifeView(ctx, device, certificates),
    certificates: certificates.map(({ id, profile, status, notBefore, notAfter, der }) => ({
      serial: id,
      profile,
      status,
      notBefore,
      notAfter,
      pem: toPem('CERTIFICATE', der),
    })),
    tags: { ...(await tagsOf(ctx, device.id)) },
    groups: members.map(({ group }) => group),
    holdings: holdings
      .map(({ key, epoch, stage, deliveredAt, installedAt, activeAt, retiredAt, reason }) => ({
        key,
        epoch: Number(epoch),
        stage,
        deliveredAt,
        installedAt,
        activeAt,
        retiredAt,
        reason,
      }))
      .toSorted((one, other) => (one.key < other.key ? -1 : one.key > other.key ? 1 : one.epoch - other.epoch)),
    lastRefusal: device.lastRefusal,
  }
}

/** A certificate as the inventory has it, `now` in milliseconds since 1970. */
export const certificateSummary = (certificate: Certificate, now: number): ResponseOf<'certificate.list'>['items'][number] => {
  const { id, profile, device, station, notBefore, notAfter, revokedAt, reason, code, replacedAt, der } = certificate
  return {
    serial: id,
    profile,
    issuer: authorityName(issuerKeyOf(certificate)),
    device,
    station: station ?? null,
    state: stateOf(certificate, now),
    notBefore,
    notAfter,
    revokedAt,
    reason,
    code: code ?? null,
    replacedAt: replacedAt ?? null,
    fingerprint: sha256hex(der),
  }
}

export const certificateView = (certificate: Certificate, now: number): ResponseOf<'certificate.show'> => ({
  ...certificateSummary(certificate, now),
  subject: parseCertificate(certificate.der).commonName,
  // Of a key with several certificates only the newest holds the bare hash.
  spkiSha256: certificate.spkiHash.slice(0, 64),
  pem: toPem('CERTIFICATE', certificate.der),
})

export const calendarView = (spans: readonly CalendarSpan[], own: readonly Deadline[]): ResponseOf<'certificate.calendar'> => ({
  spans: spans.map(({ kinds, ...span }) => ({
    ...span,
    kinds: kinds.map(({ profile, issuer, certificates }) => ({ profile: CertificateProfile.parse(profile), issuer: authorityName(issuer), certificates })),
  })),
  own: own.map(({ name, kind, at }) => ({ name, kind, at })).toSorted((one, other) => one.at - other.at),
})

export const webhookView = ({ host, failures, since, error, isDead, waiting }: WebhookHealth): NonNullable<ResponseOf<'alert.list'>['webhook']> => ({
  host,
  state: isDead ? 'dead' : failures > 0 ? 'failing' : 'working',
  since,
  error,
  waiting,
})

export const alertView = (alert: RaisedAlert): ResponseOf<'alert.list'>['items'][number] => {
  const { id, type, subject, at, mark, certificates, raisedAt, state, deliveredAt } = alert
  return { id, type, subject, at, mark, certificates, text: alertText(alert), raisedAt, state, deliveredAt }
}

export const keyView = async (ctx: Context, key: ManagedKey): Promise<ResponseOf<'key.show'>> => {
  const [epochs, grants, topics] = await Promise.all([allOf(ctx, 'epoch', { key: key.id }), allOf(ctx, 'grant', { key: key.id }), topicSpans(ctx, key.id)])
  const used = new Map(await Promise.all(epochs.map(async ({ id }) => [id, await usedOf(ctx, id)] as const)))
  return {
    id: key.id,
    algorithm: key.algorithm,
    protection: key.protection,
    current: key.current,
    latest: key.latest,
    recipientUsage: key.recipientUsage,
    originatorUsage: key.originatorUsage ?? null,
    usageLimit: key.usageLimit ?? null,
    rotatesAt: rotatesAt(
      key,
      epochs.find(({ epoch }) => epoch === key.current),
    ),
    createdAt: key.createdAt,
    grants: grants.map(({ group }): GroupId => group),
    topics: topics.map(({ topic }) => topic ?? '').toSorted(),
    epochs: epochs
      .map(({ id, epoch, state, checkValue, createdAt, activatedAt, deactivatedAt, destroyedAt, compromisedAt = null, overlap = false }) => ({
        epoch: Number(epoch),
        state,
        checkValue,
        createdAt,
        activatedAt,
        deactivatedAt,
        destroyedAt,
        compromisedAt,
        overlap,
        used: used.get(id) ?? 0,
      }))
      .toSorted((one, other) => one.epoch - other.epoch),
  }
}

const present = (counts: Readonly<Record<Stage, number>>): ResponseOf<'campaign.show'>['counts'] =>
  Object.fromEntries(Object.entries(counts).filter(([, count]) => count > 0)) as ResponseOf<'campaign.show'>['counts']

export const campaignView = async (ctx: Context, campaign: Campaign): Promise<ResponseOf<'campaign.show'>> => {
  const [waves, step, behind] = await Promise.all([countsOf(ctx, campaign), stepOf(ctx, campaign), behindOf(ctx, campaign)])
  const counts = Object.fromEntries(stages.map((stage) => [stage, waves.reduce((sum, wave) => sum + wave[stage], 0)])) as Record<Stage, number>
  const { id, key, from, to, state, because, createdAt, createdBy, finishedAt, policy, wave, approval, halted, mayCut } = campaign
  return {
    id,
    key,
    from,
    to,
    state,
    because,
    createdAt,
    createdBy,
    finishedAt,
    policy: { ...policy, waves: [...policy.waves], window: policy.window === null ? null : { ...policy.window, days: [...policy.window.days] } },
    wave,
    waves: campaign.waves,
    targets: Object.values(counts).reduce((sum, count) => sum + count, 0),
    counts: present(counts),
    waveCounts: waves.map(present),
    // A step that is due is taken in a moment.
    waitsFor: step.do === 'wait' ? step.for : 'nothing',
    until: step.do === 'wait' ? step.until : null,
    approval,
    halted,
    behind,
    mayCut: mayCut === Number.MAX_SAFE_INTEGER ? null : (mayCut ?? 0),
  }
}

export const targetView = ({ device, wave, stage, changedAt, reason }: Target): Item<'campaign.targets'> => ({ device, wave, stage, changedAt, reason })

export const auditView = ({ sequence, at, caller, from, action, subject, outcome, code, detail }: SequencedEntry): Item<'audit.list'> => ({
  sequence,
  at,
  caller,
  from,
  action,
  subject,
  outcome,
  code,
  detail,
})

export const approvalView = (approval: Approval, now: number): ResponseOf<'approval.grant'> => {
  const { id, what, detail, reason, askedBy, askedAt, expires, grantedBy } = approval
  return { id, what, detail, reason, state: approvalState(approval, now), askedBy, askedAt, expires, grantedBy }
}
