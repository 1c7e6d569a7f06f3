import { createHash, createPrivateKey, generateKeyPairSync, sign, X509Certificate } from 'node:crypto'
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { nameOf } from '@fleetkey/protocol/x509/certificate.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { defaultProfiles } from './ca/profiles.ts'
import { certificateOf, serialOf, tbsOf } from './ca/tbs.ts'
import { replaceFile } from './kms/durable.ts'

/** What a server shows on its HTTPS port while it is sealed, PEM. */
export interface SealingIdentity {
  readonly key: string
  readonly cert: string
  /** SHA-256 of the certificate, as programs print it. */
  readonly fingerprint: string
}

const day = 86_400_000
/** 99991231235959Z: no expiry (RFC 5280 §4.1.2.5). A server that was off for a year has to be opened as well. */
const never = Date.UTC(9999, 11, 31, 23, 59, 59)
const subject = 'Fleetkey server, sealed'

interface SealingOptions {
  readonly tenant: string
  /** Host names and addresses, besides localhost. */
  readonly names: readonly string[]
  /** Milliseconds since 1970. */
  readonly now: number
  readonly random: (length: number) => Uint8Array
  readonly log: (line: string) => void
}

const make = (of: SealingOptions): string => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const spki = new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))
  const tbs = tbsOf(
    defaultProfiles['server-tls'],
    { profile: 'server-tls', subject, spki, names: [...new Set([...of.names, 'localhost', '127.0.0.1', '::1'])] },
    { subject: nameOf(subject), spki, until: never },
    { tenant: of.tenant, serial: serialOf(of.random(12), of.now), notBefore: of.now - day, notAfter: never },
  )
  const certificate = certificateOf(tbs, new Uint8Array(sign('sha256', tbs, privateKey)))
  return `${privateKey.export({ format: 'pem', type: 'pkcs8' }) as string}${toPem('CERTIFICATE', certificate)}`
}

const read = (text: string): SealingIdentity | undefined => {
  const [key] = /-----BEGIN PRIVATE KEY-----[\s\S]+-----END PRIVATE KEY-----\n/.exec(text) ?? []
  const [cert] = /-----BEGIN CERTIFICATE-----[\s\S]+-----END CERTIFICATE-----\n/.exec(text) ?? []
  if (key === undefined || cert === undefined) return undefined
  try {
    const parsed = new X509Certificate(cert)
    if (!parsed.checkPrivateKey(createPrivateKey(key))) return undefined
    const hash = createHash('sha256').update(parsed.raw).digest('hex').toUpperCase()
    return { key, cert, fingerprint: hash.match(/../g)?.join(':') ?? hash }
  } catch {
    return undefined
  }
}

/**
 * Its key lies in the data folder (`sealing.pem`, 0600) because nothing is open yet that could protect it, and so it is a key of its own: under no CA, and
 * trusted by nobody but who hands in shares, by its certificate (`sealing.crt`, for others). Made when there is none.
 */
export const openSealing = (data: string, of: SealingOptions): SealingIdentity => {
  const [path, copy] = [join(data, 'sealing.pem'), join(data, 'sealing.crt')]
  const found = existsSync(path)
  let identity = found ? read(readFileSync(path, 'utf8')) : undefined
  if (identity === undefined) {
    if (found) of.log(`${path} was damaged and is made anew: whoever hands in shares needs the new ${copy}`)
    const made = make(of)
    replaceFile(path, Buffer.from(made))
    // A crash here: the next start writes the copy.
    identity = read(made)
    if (identity === undefined) throw new Error('the certificate that was made is none')
  }
  if (!existsSync(copy) || readFileSync(copy, 'utf8') !== identity.cert) writeFileSync(copy, identity.cert)
  return identity
}
