import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { crlFault, parseCrl, type Crl } from '@fleetkey/protocol/x509/crl.ts'
import { validateChain } from '@fleetkey/protocol/x509/path.ts'
import { hasProgram } from './programs.ts'

const here = hasProgram('openssl')

/** Certificates and revocation lists that OpenSSL's own CA made. */
describe.skipIf(!here)('a CA run with openssl', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-openssl-ca-'))
  const openssl = (...args: string[]): Buffer => execFileSync('openssl', args, { cwd: folder, stdio: ['ignore', 'pipe', 'ignore'] })
  const certificate = (name: string): Certificate => parseCertificate(new Uint8Array(openssl('x509', '-in', `${name}.pem`, '-outform', 'der')))
  const lists: Record<string, Uint8Array> = {}
  let root: Certificate
  let good: Certificate
  let bad: Certificate

  const listed = (name: string, ...more: string[]): void => {
    openssl('ca', '-config', 'ca.cnf', '-gencrl', '-out', `${name}.crl`, ...more)
    lists[name] = new Uint8Array(openssl('crl', '-in', `${name}.crl`, '-outform', 'der'))
  }
  /** Of what `openssl x509 -req` issues. */
  const extended = ['-extfile', 'ca.cnf', '-extensions', 'leaf', '-days', '30']
  const crl = (name: string): Crl => parseCrl(lists[name] ?? new Uint8Array())

  beforeAll(() => {
    if (!here) return
    writeFileSync(
      join(folder, 'ca.cnf'),
      `[ca]
default_ca = d
[d]
database = index.txt
new_certs_dir = .
serial = serial
crlnumber = crlnumber
certificate = root.pem
private_key = root.key
default_md = sha256
default_days = 30
default_crl_days = 30
policy = p
x509_extensions = leaf
crl_extensions = crl
[p]
commonName = supplied
[leaf]
basicConstraints = CA:FALSE
keyUsage = digitalSignature
authorityKeyIdentifier = keyid
[crl]
authorityKeyIdentifier = keyid
[delta]
deltaCRL = critical,DER:02:01:01
[partition]
issuingDistributionPoint = critical,@point
[point]
onlyuser = TRUE
[req]
distinguished_name = n
x509_extensions = root
[n]
[root]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
`,
    )
    for (const [name, content] of [
      ['index.txt', ''],
      ['serial', '1001'],
      ['crlnumber', '01'],
    ] as const)
      writeFileSync(join(folder, name), content)
    const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes']
    openssl('req', '-x509', ...key, '-days', '365', '-subj', '/CN=maker', '-keyout', 'root.key', '-out', 'root.pem', '-config', 'ca.cnf')
    openssl('req', '-x509', ...key, '-days', '365', '-subj', '/CN=maker', '-keyout', 'twin.key', '-out', 'twin.pem', '-config', 'ca.cnf')
    for (const name of ['good', 'bad']) {
      openssl('req', ...key, '-subj', `/CN=${name}`, '-keyout', `${name}.key`, '-out', `${name}.csr`, '-config', 'ca.cnf')
      openssl('ca', '-batch', '-notext', '-config', 'ca.cnf', '-in', `${name}.csr`, '-out', `${name}.pem`)
    }
    listed('empty')
    openssl('ca', '-config', 'ca.cnf', '-revoke', 'bad.pem')
    listed('full')
    listed('twin', '-cert', 'twin.pem', '-keyfile', 'twin.key')
    listed('delta', '-crlexts', 'delta')
    listed('partition', '-crlexts', 'partition')
    root = certificate('root')
    good = certificate('good')
    bad = certificate('bad')
  })
  afterAll(() => rmSync(folder, { recursive: true, force: true }))

  const judged = (leaf: Certificate, ...crls: Crl[]) => {
    const result = validateChain({ leaf, intermediates: [], roots: [root], at: Date.now(), crls })
    return result.ok ? 'ok' : result.why
  }

  // OpenSSL signs and reads both kinds alike: only the bytes tell whether a curve was named or described.
  test.each([
    ['named_curve', 'ok', 'ok'],
    ['explicit', 'key.explicit-curve', 'key.explicit-curve'],
  ])('keys with a %s, in a leaf and in a CA of the chain', (encoding, ...want) => {
    const config = ['-config', 'ca.cnf', '-days', '30']
    const found = ['leaf', 'root'].map((place) => {
      const name = `${place}-${encoding}`
      openssl('ecparam', '-genkey', '-noout', '-name', 'prime256v1', '-param_enc', encoding, '-out', `${name}.key`)
      openssl('req', '-x509', '-new', '-key', `${name}.key`, '-subj', `/CN=${name}`, '-out', `${name}.pem`, ...config, '-extensions', 'root')
      if (place === 'leaf') {
        openssl('req', '-new', '-key', `${name}.key`, '-subj', `/CN=${name}`, '-out', `${name}.csr`, '-config', 'ca.cnf')
        openssl('ca', '-batch', '-notext', '-config', 'ca.cnf', '-in', `${name}.csr`, '-out', `${name}.pem`)
      } else {
        openssl('req', '-new', '-key', 'good.key', '-subj', '/CN=below', '-out', 'below.csr', '-config', 'ca.cnf')
        openssl('x509', '-req', '-in', 'below.csr', '-CA', `${name}.pem`, '-CAkey', `${name}.key`, '-out', 'below.pem', '-CAcreateserial', ...extended)
      }
      try {
        const [leaf, roots] = place === 'leaf' ? [certificate(name), [root]] : [certificate('below'), [certificate(name)]]
        const result = validateChain({ leaf, intermediates: [], roots, at: Date.now() })
        return result.ok ? 'ok' : result.why
      } catch (error) {
        return error instanceof Problem ? error.reason : String(error)
      }
    })
    expect(found).toEqual(want)
  })

  test('whoever is on the list is revoked, whoever is not is not', () => {
    expect(judged(bad)).toBe('ok')
    expect(judged(good, crl('full'))).toBe('ok')
    expect(judged(bad, crl('full'))).toBe('revoked')
    expect(judged(bad, crl('empty'))).toBe('ok')
    expect(crl('full').revoked.size).toBe(1)
  })

  test('several lists: the worst one counts', () => expect(judged(bad, crl('empty'), crl('full'))).toBe('revoked'))

  test('a list of the same name and another key clears nobody', () => expect(judged(good, crl('twin'))).toBe('crl-signature'))

  test('a list that has run out clears nobody', () => {
    expect(crlFault(crl('full'), good, root, Date.now() + 31 * 86_400_000)).toBe('crl-expired')
    expect(crlFault(crl('full'), good, root, Date.now() - 86_400_000)).toBe('crl-expired')
  })

  test.each(['delta', 'partition'])('a %s list is not taken for a complete one', (name) => expect(() => crl(name)).toThrow(Problem))

  test('a list cut or changed anywhere is refused, or does not bear the signature', () => {
    const full = lists['full'] ?? new Uint8Array()
    expect(full.length).toBeGreaterThan(100)
    for (let at = 0; at < full.length; at++) {
      const changed = full.map((byte, index) => (index === at ? byte ^ 0x01 : byte))
      for (const bytes of [full.subarray(0, at), changed]) {
        let parsed: Crl
        try {
          parsed = parseCrl(bytes)
        } catch (error) {
          expect(error).toBeInstanceOf(Problem)
          continue
        }
        expect(crlFault(parsed, bad, root, Date.now())).toBeDefined()
      }
    }
  })
})
