import { EndorsementPolicyView } from '@fleetkey/protocol/admin.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { crlFault, parseCrl, type Crl } from '@fleetkey/protocol/x509/crl.ts'
import { fromPem, pemLabels } from '@fleetkey/protocol/x509/pem.ts'
import { keyUsages } from '@fleetkey/protocol/x509/oids.ts'
import { noEndorsementPolicy, type EndorsementPolicy } from '../attestation/endorsement-policy.ts'
import { isFirmwareVersion } from '../attestation/firmware.ts'
import type { EndorsementPurpose } from '../attestation/endorsements.ts'
import type { Caller } from '../access/caller.ts'
import { hasIdentity, type Device, type Endorsement } from '../fleet/device.ts'
import type { Context } from './context.ts'
import { perform, type Transaction } from './perform.ts'
import { findAll } from './rows.ts'

export interface ImportedEndorsements {
  /** SHA-256 of the first certificate of the bundle: the only one, in most. */
  readonly id: string
  readonly roots: number
  readonly intermediates: number
  readonly crls: number
}

const text = (certificate: Certificate): string => certificate.native.subject.replaceAll('\n', ', ').slice(0, 200)

const readCa = (der: Uint8Array): Certificate => {
  const certificate = parseCertificate(der)
  if (certificate.basicConstraints?.ca !== true || certificate.keyUsage?.has(keyUsages.keyCertSign) !== true)
    throw new Problem('malformed', `${text(certificate)}: not the certificate of a CA`, { reason: 'endorsement.not-a-ca' })
  return certificate
}

const issued = (issuer: Certificate, certificate: Certificate): boolean =>
  Buffer.compare(issuer.subject, certificate.issuer) === 0 && certificate.native.verify(issuer.native.publicKey)
const isRoot = (certificate: Certificate): boolean => issued(certificate, certificate)

const purposeOf = ({ purpose }: Pick<Endorsement, 'purpose'>): EndorsementPurpose => purpose ?? 'ek'

/** CAs of a bundle: self-signed ones are trusted themselves, the others only through an issuer that is in the bundle or trusted already for the same purpose. */
const newRows = (
  certificates: readonly Certificate[],
  known: readonly Endorsement[],
  of: { purpose: EndorsementPurpose; test: boolean; now: number },
): readonly Endorsement[] => {
  const mine = known.filter((row) => purposeOf(row) === of.purpose)
  const issuers = [...certificates, ...mine.map(({ certificate }) => parseCertificate(certificate))]
  const other = known.find((row) => purposeOf(row) !== of.purpose && certificates.some(({ fingerprint }) => fingerprint === row.id))
  // One CA, one purpose: what vouches for TPMs never comes to vouch for anything else.
  if (other !== undefined)
    throw new Problem('conflict', `${other.subject} is trusted for ${purposeOf(other)} already: remove it there first`, { reason: 'endorsement.purpose' })
  return certificates
    .filter(({ fingerprint }) => known.every(({ id }) => id !== fingerprint))
    .map((certificate) => {
      const root = isRoot(certificate)
      if (!root && !issuers.some((issuer) => issued(issuer, certificate)))
        throw new Problem('malformed', `${text(certificate)}: import its issuer along with it`, { reason: 'endorsement.no-issuer' })
      const { fingerprint: id, der } = certificate
      return {
        id,
        version: 0,
        certificate: der,
        subject: text(certificate),
        test: of.test,
        ...(of.purpose === 'idevid' ? { purpose: 'idevid' as const } : {}),
        ...(root ? {} : { intermediate: true }),
        importedAt: of.now,
      }
    })
}

/** Whether this CA may sign lists and signed this one. */
const isCrlOf = (crl: Crl, issuer: Certificate): boolean => {
  const fault = crlFault(crl, issuer, issuer, crl.thisUpdate)
  return fault === undefined || fault === 'revoked'
}

/** A CRL goes to the CA that signed it, unless that has a newer one. */
const withCrl = (rows: Map<string, Endorsement>, der: Uint8Array): void => {
  const crl = parseCrl(der)
  const issuer = [...rows.values()].find(({ certificate }) => isCrlOf(crl, parseCertificate(certificate)))
  if (issuer === undefined) throw new Problem('malformed', 'a CRL that no trusted CA signed', { reason: 'endorsement.crl-issuer' })
  if (issuer.crl !== undefined && parseCrl(issuer.crl).thisUpdate > crl.thisUpdate)
    throw new Problem('conflict', `${issuer.subject} has a newer CRL`, { reason: 'endorsement.crl-older' })
  rows.set(issuer.id, { ...issuer, crl: der })
}

/**
 * Trusts the CAs of a bundle (PEM: roots, intermediates, CRLs) that vouch for EKs, or for IDevIDs. `test` admits a simulator's: what it vouches for is `simulated`,
 * which every report says. Throws Problem: `malformed` for what is no CA or no CRL of one, `conflict` when there is nothing new in it.
 */
export const importEndorsement = async (
  ctx: Context,
  caller: Caller,
  input: { certificate: string; test: boolean; for?: EndorsementPurpose | undefined },
): Promise<ImportedEndorsements> => {
  const imported = await perform(ctx, { caller, action: 'endorsement.import', subject: 'endorsement' }, async (tx) => {
    const certificates = blocks('CERTIFICATE', input.certificate).map(readCa)
    const crls = blocks('X509 CRL', input.certificate)
    const known = await findAll(ctx.store, 'endorsement')
    const fresh = newRows(certificates, known, { purpose: input.for ?? 'ek', test: input.test, now: ctx.now() })
    const id = certificates[0]?.fingerprint ?? known[0]?.id
    if (id === undefined) throw new Problem('malformed', 'a CRL without the CA that signed it', { reason: 'endorsement.crl-issuer' })
    if (fresh.length === 0 && crls.length === 0) throw new Problem('conflict', `endorsement ${id} is trusted already`)
    const rows = new Map([...known, ...fresh].map((row) => [row.id, row]))
    for (const crl of crls) withCrl(rows, crl)
    write(tx, rows, known)
    tx.note(
      [
        ...fresh.map((row) => `${row.subject} for ${purposeOf(row)}${input.test ? ': TEST, admits simulated devices' : ''}`),
        ...(crls.length > 0 ? [`${crls.length} CRLs`] : []),
      ].join('; '),
    )
    const intermediates = fresh.filter(({ intermediate }) => intermediate === true).length
    return { id, roots: fresh.length - intermediates, intermediates, crls: crls.length }
  })
  ctx.step('endorsement.import')
  return imported
}

/** A bundle of every maker's roots and intermediates has some hundred certificates. */
const bundleLimits = { blocks: 1024, length: 2 << 20 } as const
const blocks = (label: string, bundle: string): readonly Uint8Array[] => (pemLabels(bundle).includes(label) ? fromPem(label, bundle, bundleLimits) : [])

const write = (tx: Transaction, rows: ReadonlyMap<string, Endorsement>, known: readonly Endorsement[]): void => {
  for (const row of rows.values()) {
    const before = known.find(({ id }) => id === row.id)
    if (before === undefined) tx.insert('endorsement', row)
    else if (before.crl !== row.crl) tx.update('endorsement', row)
  }
}

/** How many devices with an identity each endorsement vouches for. Reads every device: an operator's rare question. */
export const devicesByEndorsement = async (ctx: Context): Promise<ReadonlyMap<string, number>> => {
  const counts = new Map<string, number>()
  const count = (device: Device): void => {
    if (hasIdentity(device)) for (const id of device.endorsedBy ?? []) counts.set(id, (counts.get(id) ?? 0) + 1)
  }
  for (const state of ['enrolled', 'quarantined'] as const)
    for (let after: string | undefined; ;) {
      const page = await ctx.store.find('device', { where: { state }, limit: 1000, ...(after === undefined ? {} : { after }) })
      for (const device of page) count(device)
      if (page.length < 1000) break
      after = page.at(-1)?.id
    }
  return counts
}

/**
 * Takes trust away. Devices that rest on it keep their identity; their next attestation is refused. How many these are is in the answer; with `dryRun` nothing
 * else happens. Intermediates below a removed root stay, and vouch for nothing without it. Throws Problem('not-found').
 */
export const removeEndorsement = async (ctx: Context, caller: Caller, id: string, options: { readonly dryRun: boolean }): Promise<{ devices: number }> => {
  const devices = (await devicesByEndorsement(ctx)).get(id) ?? 0
  if (options.dryRun) {
    if ((await ctx.store.get('endorsement', id)) === undefined) throw new Problem('not-found', `no endorsement ${id}`)
    return { devices }
  }
  await perform(ctx, { caller, action: 'endorsement.remove', subject: 'endorsement' }, async (tx) => {
    const row = await ctx.store.get('endorsement', id)
    if (row === undefined) throw new Problem('not-found', `no endorsement ${id}`)
    tx.remove('endorsement', row)
    tx.note(`${row.subject} (${id}): ${devices} devices rest on it`)
  })
  ctx.step('endorsement.remove')
  return { devices }
}

const settingId = 'endorsement-policy'

/** Deny list, TPM firmware floors and updates, allowed manufacturers. */
export const endorsementPolicy = async (ctx: Pick<Context, 'store'>): Promise<EndorsementPolicy> => {
  const row = await ctx.store.get('setting', settingId)
  return row === undefined ? noEndorsementPolicy : EndorsementPolicyView.parse(JSON.parse(Buffer.from(row.value).toString('utf8')))
}

const versionsOf = ({ deny, floors, updates }: EndorsementPolicy): readonly string[] => [
  ...deny.flatMap((denied) => ('firmware' in denied ? [denied.firmware] : [])),
  ...floors.map(({ minimum }) => minimum),
  ...updates.flatMap(({ from, to }) => [from, to]),
]

/** Replaces the parts that are given. */
export const setEndorsementPolicy = async (ctx: Context, caller: Caller, change: Partial<EndorsementPolicy>): Promise<EndorsementPolicy> => {
  const changed = await perform(ctx, { caller, action: 'endorsement.policy', subject: 'endorsement' }, async (tx) => {
    const row = await ctx.store.get('setting', settingId)
    const policy: EndorsementPolicy = { ...(await endorsementPolicy(ctx)), ...change }
    const wrong = versionsOf(policy).find((version) => !isFirmwareVersion(version))
    if (wrong !== undefined) throw new Problem('malformed', `TPM firmware version ${wrong}`)
    const value = new Uint8Array(Buffer.from(JSON.stringify(policy)))
    if (row === undefined) tx.insert('setting', { id: settingId, value })
    else tx.update('setting', { ...row, value })
    tx.note(
      `${policy.deny.length} denied, ${policy.floors.length} floors, ${policy.updates.length} updates, manufacturers ${policy.manufacturers?.join() ?? 'all registered'}`,
    )
    return policy
  })
  ctx.step('endorsement.policy')
  return changed
}
