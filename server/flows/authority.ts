import { generateKeyPairSync } from 'node:crypto'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Signer } from '@fleetkey/protocol/signed.ts'
import { nameOf, parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import type { Role } from '@fleetkey/protocol/x509/roles.ts'
import type { Caller } from '../access/caller.ts'
import type { ProfileName } from '../ca/certificate.ts'
import type { StatusPlaces } from '../ca/profiles.ts'
import type { Base, KmsKeyPurpose } from './context.ts'
import { prepareCertificates, recordIssued, type Issuer, type Order } from './issue.ts'
import { kmsSigner } from './message.ts'
import { perform } from './perform.ts'

/** The server's own standing: its CAs, and the keys that sign messages, each with its certificate. */
export interface Authority extends Issuer {
  /** Certificates, DER. */
  readonly root: Uint8Array
  readonly issuing: Uint8Array
  /** The root as an issuer: of the issuing CA, and of what speaks for the root. */
  readonly byRoot: Issuer
  readonly roles: Readonly<Record<Role, Signer & { readonly certificate: Uint8Array }>>
  /** Name of the KMS key that wraps data keys and challenge secrets. */
  readonly kek: string
}

const system: Caller = { kind: 'system', id: 'setup', from: 'server' }
const roles: readonly Role[] = ['challenge', 'delivery', 'group', 'release']

const publicKeyOf = async (ctx: Base, name: string, purpose: KmsKeyPurpose): Promise<Uint8Array> => {
  const { spki } = await ctx.kms.create(name, purpose)
  if (spki === null) throw new Problem('internal', `KMS key ${name} has no public key`)
  return spki
}

/** The certificate of that setting, issued now if there is none yet. A crash in between leaves an open intent; the next start issues anew. */
const ensure = async (ctx: Base, setting: string, issuer: Issuer, order: Omit<Order, 'device'>): Promise<Uint8Array> => {
  const known = await ctx.store.get('setting', setting)
  if (known !== undefined) return known.value
  const [issued] = await prepareCertificates(ctx, issuer, { caller: system, action: 'server.setup', subject: setting }, [{ ...order, device: null }])
  if (issued === undefined) throw new Problem('internal', 'one certificate was ordered')
  await perform(ctx, { caller: system, action: 'server.setup', subject: setting, detail: `${order.profile} ${issued.intent.id}` }, (tx) => {
    recordIssued(tx, issued)
    tx.insert('setting', { id: setting, value: issued.der })
  })
  ctx.step(`setup.${setting}`)
  return issued.der
}

/**
 * First start: makes the keys in the KMS and their certificates. Later starts: reads them. Harmless to repeat after a crash at any point. `status`: what
 * certificates from now on say about where others ask about them.
 */
export const openAuthority = async (ctx: Base, status?: StatusPlaces): Promise<Authority> => {
  await ctx.kms.create('kek', 'kek')
  ctx.step('setup.kek')
  const [rootKey, issuingKey] = [await publicKeyOf(ctx, 'root-ca', 'root-ca'), await publicKeyOf(ctx, 'issuing-ca', 'issuing-ca')]
  const [rootName, issuingName] = [`Fleetkey root of ${ctx.tenant}`, `Fleetkey issuing CA of ${ctx.tenant}`]
  const byRoot: Issuer = { subject: nameOf(rootName), spki: rootKey, key: 'root-ca', purpose: 'root-ca' }
  const issuer: Issuer = { subject: nameOf(issuingName), spki: issuingKey, key: 'issuing-ca', purpose: 'issuing-ca', status }
  const root = await ensure(ctx, 'ca/root', byRoot, { profile: 'root-ca', subject: rootName, spki: rootKey })
  const issuing = await ensure(ctx, 'ca/issuing', byRoot, { profile: 'issuing-ca', subject: issuingName, spki: issuingKey })
  const entries: [Role, Signer & { certificate: Uint8Array }][] = []
  for (const role of roles) {
    const key = `${role}-signing` as const
    const spki = await publicKeyOf(ctx, key, key)
    const certificate = await ensure(ctx, `ca/role/${role}`, issuer, { profile: 'server-signing', subject: `Fleetkey ${role} of ${ctx.tenant}`, spki, role })
    entries.push([role, { ...kmsSigner(ctx.kms, key, key, spki), certificate }])
  }
  return { ...issuer, byRoot, root, issuing, roles: Object.fromEntries(entries) as Authority['roles'], kek: 'kek' }
}

/**
 * A TLS key that lives in this process only, with a fresh certificate for these names and localhost: there is no TLS private key at rest.
 * PEM: key, and the chain from the server's certificate to the issuing CA.
 */
export const serverTls = async (ctx: Base, authority: Authority, names: readonly string[]): Promise<{ key: string; cert: string; notAfter: number }> => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const profile: ProfileName = 'server-tls'
  const order: Order = {
    profile,
    subject: 'Fleetkey server',
    spki: new Uint8Array(publicKey.export({ format: 'der', type: 'spki' })),
    names: [...new Set([...names, 'localhost', '127.0.0.1', '::1'])],
    device: null,
  }
  const [issued] = await prepareCertificates(ctx, authority, { caller: system, action: 'server.setup', subject: 'server-tls' }, [order])
  if (issued === undefined) throw new Problem('internal', 'one certificate was ordered')
  await perform(ctx, { caller: system, action: 'server.setup', subject: 'server-tls', detail: issued.intent.id }, (tx) => recordIssued(tx, issued))
  return {
    key: privateKey.export({ format: 'pem', type: 'pkcs8' }) as string,
    cert: toPem('CERTIFICATE', issued.der) + toPem('CERTIFICATE', authority.issuing),
    notAfter: parseCertificate(issued.der).notAfter,
  }
}
