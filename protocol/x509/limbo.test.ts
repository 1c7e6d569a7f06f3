import { describe, expect, test } from 'vitest'
import { counted, readVectors, vectors } from '@fleetkey/test/public-vectors.ts'
import { parseCertificate, type Certificate } from './certificate.ts'
import { parseCrl } from './crl.ts'
import { whole } from './der.ts'
import { readGeneralName } from './general-names.ts'
import { oids } from './oids.ts'
import { validateChain } from './path.ts'

interface Case {
  readonly id: string
  readonly validation_kind: 'SERVER' | 'CLIENT'
  readonly trusted_certs: readonly string[]
  readonly untrusted_intermediates: readonly string[]
  readonly peer_certificate: string
  readonly validation_time: string | null
  readonly expected_result: 'SUCCESS' | 'FAILURE'
  readonly expected_peer_name: { readonly kind: string; readonly value: string } | null
  readonly max_chain_depth: number | null
  readonly crls?: readonly string[]
}

const der = (pem: string): Uint8Array => new Uint8Array(Buffer.from(pem.replace(/-----[^-]+-----|\s/g, ''), 'base64'))

/** What a peer offers besides its own certificate is passed over when it is not even a certificate. */
const readable = (pems: readonly string[]): readonly Certificate[] =>
  pems.flatMap((pem) => {
    try {
      return [parseCertificate(der(pem))]
    } catch {
      return []
    }
  })

const bears = ({ altNames }: Certificate, name: string): boolean =>
  altNames.some((bytes) => {
    const found = readGeneralName(whole(bytes, bytes[0] ?? 0))
    return found.kind === 'dns' && found.text === name
  })

/** The outcome, and what it costs in milliseconds. */
const outcome = (of: Case): 'SUCCESS' | 'FAILURE' => {
  try {
    const leaf = parseCertificate(der(of.peer_certificate))
    const result = validateChain({
      leaf,
      intermediates: readable(of.untrusted_intermediates),
      roots: readable(of.trusted_certs),
      at: Date.parse(of.validation_time ?? '2024-06-01T00:00:00Z'),
      eku: of.validation_kind === 'SERVER' ? oids.serverAuth : oids.clientAuth,
      ekuMayBeAbsent: true,
      leafMayBeCa: true,
      ...(of.max_chain_depth === null ? {} : { maxIntermediates: of.max_chain_depth }),
      crls: (of.crls ?? []).map((pem) => parseCrl(der(pem))),
    })
    const name = of.expected_peer_name
    return result.ok && (name?.kind !== 'DNS' || bears(leaf, name.value)) ? 'SUCCESS' : 'FAILURE'
  } catch {
    return 'FAILURE'
  }
}

/**
 * Two cases have a root of the same make (issued by a CA that is not trusted, without authorityKeyIdentifier) and opposite verdicts:
 * `rfc5280::aki::cross-signed-root-missing-aki` wants it refused. The stricter one is followed.
 */
const contradicted = 'cve::cve-2024-0567'

describe.skipIf(vectors.folder === undefined)('C2SP x509-limbo, core suites without webpki', () => {
  const { testcases } = vectors.folder === undefined ? { testcases: [] } : (JSON.parse(readVectors('x509-limbo/limbo-core.json')) as { testcases: Case[] })
  const ours = testcases.filter(({ id }) => !id.startsWith('webpki::'))

  test('they are all there', () => {
    expect(ours.length).toBe(137)
    counted('x509-limbo', ours.length, testcases.length)
  })
  test.each(ours.filter(({ id }) => id !== contradicted))('$id', (of) => expect(outcome(of)).toBe(of.expected_result))
  test(`${contradicted}: refused, as its twin must be`, () => {
    const twins = ours.filter(({ id }) => id === contradicted || id === 'rfc5280::aki::cross-signed-root-missing-aki')
    expect(twins.map(outcome)).toEqual(['FAILURE', 'FAILURE'])
    expect(new Set(twins.map(({ expected_result }) => expected_result)).size).toBe(2)
  })
})
