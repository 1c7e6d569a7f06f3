import { Problem, type ProblemCode } from '../../problem.ts'

/**
 * Why a certification request is refused. `cases`: numbers of the acceptance list of docs/pki.md that the code answers; `code`: what the requester is told;
 * `source`: where the rule is written; `remedy`: what whoever made the request does about it.
 */
export interface RequestReason {
  readonly cases: readonly number[]
  readonly code: ProblemCode
  readonly meaning: string
  readonly source: string
  readonly remedy: string
}

const encoder = 'Encode the request in DER; `openssl req` does.'
const p256 = 'Make a P-256 key: `openssl ecparam -name prime256v1 -genkey`.'
const ask = 'Ask for nothing: names, usages and dates come from the profile.'

const encoding = {
  'csr.size': { cases: [30], code: 'malformed', meaning: 'The request has more than 16 KiB.', source: 'bound of this CA', remedy: ask },
  'csr.pem': {
    cases: [],
    code: 'malformed',
    meaning: 'The file is neither DER nor one PEM block of a CERTIFICATE REQUEST (`ca check-csr` only).',
    source: 'RFC 7468 §7',
    remedy: 'One request a file: `openssl req -new -key KEY -out FILE`.',
  },
  'csr.der': { cases: [], code: 'malformed', meaning: 'The request is no DER structure of PKCS #10, or ends early.', source: 'RFC 2986 §4', remedy: encoder },
  'csr.der.trailing': { cases: [24], code: 'malformed', meaning: 'Bytes follow the structure they belong to.', source: 'X.690 §8.1', remedy: encoder },
  'csr.der.indefinite': { cases: [25], code: 'malformed', meaning: 'A length is indefinite: BER, not DER.', source: 'X.690 §10.1', remedy: encoder },
  'csr.der.length': { cases: [26], code: 'malformed', meaning: 'A length is not encoded in the fewest bytes.', source: 'X.690 §10.1', remedy: encoder },
  'csr.der.depth': { cases: [31], code: 'malformed', meaning: 'Structures are nested more than 12 deep.', source: 'bound of this CA', remedy: ask },
  'csr.der.value': { cases: [], code: 'malformed', meaning: 'A value is in another form than the one of DER.', source: 'X.690 §8, §11', remedy: encoder },
  'csr.version': { cases: [27], code: 'malformed', meaning: 'The version is not 0.', source: 'RFC 2986 §4.1', remedy: encoder },
  'csr.attribute.count': { cases: [56], code: 'malformed', meaning: 'There are more than four attributes.', source: 'bound of this CA', remedy: ask },
  'csr.attribute.duplicate': {
    cases: [23],
    code: 'malformed',
    meaning: 'An attribute stands twice, or has not exactly one value.',
    source: 'RFC 2985 §5.4',
    remedy: encoder,
  },
  'csr.attribute.password': {
    cases: [47],
    code: 'unsupported',
    meaning: 'The request carries a challengePassword: a secret that would be kept and could be used again.',
    source: 'RFC 2985 §5.4.1',
    remedy: 'Leave the attribute out; enrolment tokens travel beside the request, and are spent once.',
  },
  'csr.attribute.unknown': {
    cases: [],
    code: 'unsupported',
    meaning: 'There is an attribute other than extensionRequest.',
    source: 'RFC 2985 §5.4',
    remedy: ask,
  },
  'csr.extension.duplicate': { cases: [22], code: 'malformed', meaning: 'An extension is asked for twice.', source: 'RFC 5280 §4.2', remedy: encoder },
} as const satisfies Readonly<Record<string, RequestReason>>

const key = {
  'csr.key.algorithm': {
    cases: [34, 36],
    code: 'unsupported',
    meaning: 'The key is of an algorithm that no profile admits (DSA, Ed25519, RSASSA-PSS, …).',
    source: 'profile, allowed keys',
    remedy: p256,
  },
  'csr.key.agreement': {
    cases: [54],
    code: 'unsupported',
    meaning: 'The key cannot sign (X25519, X448, a KEM): it cannot have proven that somebody has it.',
    source: 'RFC 8410 §3',
    remedy: p256,
  },
  'csr.key.encoding': {
    cases: [28],
    code: 'malformed',
    meaning: 'The key is not encoded as the algorithm it names.',
    source: 'RFC 5480 §2, RFC 8017 §A.1.1',
    remedy: encoder,
  },
  'csr.key.bits': { cases: [45], code: 'malformed', meaning: 'The BIT STRING of the key has unused bits.', source: 'RFC 5280 §4.1.2.7', remedy: encoder },
  'csr.key.curve': { cases: [5, 6], code: 'unsupported', meaning: 'The curve is none that the profile admits.', source: 'profile, allowed keys', remedy: p256 },
  'csr.ec.explicit': {
    cases: [7],
    code: 'malformed',
    meaning: 'The curve is given by its parameters instead of its name (CVE-2020-0601).',
    source: 'RFC 5480 §2.1.1',
    remedy: 'Name the curve: `-param_enc named_curve`.',
  },
  'csr.ec.compressed': {
    cases: [35],
    code: 'malformed',
    meaning: 'The point is compressed or hybrid: the same key would have two hashes.',
    source: 'RFC 5480 §2.2',
    remedy: 'Write the point uncompressed: `-conv_form uncompressed`.',
  },
  'csr.ec.infinity': { cases: [4], code: 'malformed', meaning: 'The key is the point at infinity.', source: 'SP 800-56A §5.6.2.3.3', remedy: p256 },
  'csr.ec.off-curve': { cases: [3], code: 'malformed', meaning: 'The point does not lie on the curve.', source: 'SP 800-56A §5.6.2.3.3', remedy: p256 },
  'csr.rsa.modulus': { cases: [46], code: 'malformed', meaning: 'The RSA modulus is zero or negative.', source: 'RFC 8017 §3.1', remedy: p256 },
  'csr.rsa.long': { cases: [13, 55], code: 'unsupported', meaning: 'The RSA modulus has more than 4096 bits.', source: 'bound of this CA', remedy: p256 },
  'csr.rsa.even': { cases: [12], code: 'malformed', meaning: 'The RSA modulus is even.', source: 'CA/B BR §6.1.6', remedy: p256 },
  'csr.rsa.factor': { cases: [], code: 'unsupported', meaning: 'A prime below 752 divides the RSA modulus.', source: 'CA/B BR §6.1.6', remedy: p256 },
  'csr.rsa.exponent': {
    cases: [10, 11, 59],
    code: 'unsupported',
    meaning: 'The RSA exponent is even, below 65537 or above 2^32.',
    source: 'CA/B BR §6.1.6',
    remedy: p256,
  },
  'csr.rsa.roca': { cases: [38], code: 'unsupported', meaning: 'The RSA key has the fingerprint of CVE-2017-15361.', source: 'CA/B BR §6.1.1.3', remedy: p256 },
  'csr.rsa.close-primes': {
    cases: [37, 41],
    code: 'unsupported',
    meaning: 'The RSA modulus factors within 100 rounds of Fermat: its primes are too close.',
    source: 'CA/B BR §6.1.1.3',
    remedy: p256,
  },
  'csr.rsa.short': {
    cases: [8, 9, 40],
    code: 'unsupported',
    meaning: 'The RSA modulus has fewer than 3072 bits; the sizes that Debian’s generator of 2008 was used with are among them.',
    source: 'SP 800-57 Part 1 §5.6; CVE-2008-0166',
    remedy: p256,
  },
  'csr.rsa.not-admitted': {
    cases: [39],
    code: 'unsupported',
    meaning: 'No profile admits RSA. A prime shared with another key of the fleet is refused with it.',
    source: 'profile, allowed keys',
    remedy: p256,
  },
} as const satisfies Readonly<Record<string, RequestReason>>

const possession = {
  'csr.signature.hash': {
    cases: [14],
    code: 'unsupported',
    meaning: 'The request is signed with SHA-1 or MD5.',
    source: 'SP 800-131A §3',
    remedy: 'Sign with SHA-256.',
  },
  'csr.signature.algorithm': {
    cases: [60],
    code: 'unsupported',
    meaning: 'The signature algorithm is not the one of the key: ECDSA with SHA-256 for P-256, with SHA-384 for P-384.',
    source: 'RFC 5758 §3.2',
    remedy: 'Sign with the hash of the curve.',
  },
  'csr.signature.parameters': {
    cases: [],
    code: 'malformed',
    meaning: 'The signature algorithm has parameters where none belong.',
    source: 'RFC 5758 §3.2',
    remedy: encoder,
  },
  'csr.signature.encoding': {
    cases: [32],
    code: 'malformed',
    meaning: 'The signature is no DER Ecdsa-Sig-Value: padded, negative or trailing.',
    source: 'RFC 3279 §2.2.3',
    remedy: encoder,
  },
  'csr.signature.range': {
    cases: [33],
    code: 'malformed',
    meaning: 'r or s is zero, or not below the order of the curve.',
    source: 'FIPS 186-5 §6.4.2',
    remedy: 'Sign the request with its own key.',
  },
  'csr.signature': {
    cases: [1, 2],
    code: 'unauthenticated',
    meaning: 'The request is not signed by the key it is for.',
    source: 'RFC 2986 §3',
    remedy: 'Sign the request with its own key.',
  },
} as const satisfies Readonly<Record<string, RequestReason>>

const wishes = {
  'csr.subject': {
    cases: [],
    code: 'malformed',
    meaning: 'The subject is no Name, or has more than 16 attributes.',
    source: 'RFC 5280 §4.1.2.4',
    remedy: encoder,
  },
  'csr.subject.empty': {
    cases: [29],
    code: 'malformed',
    meaning: 'Neither subject nor alternative name says who asks.',
    source: 'RFC 5280 §4.1.2.6',
    remedy: 'Put the id or serial of the device into the common name.',
  },
  'csr.subject.names': {
    cases: [21],
    code: 'malformed',
    meaning: 'There is more than one common name.',
    source: 'CA/B BR §7.1.4.3',
    remedy: 'One common name: the id of the device.',
  },
  'csr.subject.string': {
    cases: [57],
    code: 'malformed',
    meaning: 'A name is no UTF8String or PrintableString (BMP, Teletex, Universal, …).',
    source: 'RFC 5280 §4.1.2.4',
    remedy: 'Use UTF8String: `-utf8`.',
  },
  'csr.subject.encoding': { cases: [20], code: 'malformed', meaning: 'A name is not the UTF-8 it says it is.', source: 'RFC 3629 §3', remedy: encoder },
  'csr.subject.control': {
    cases: [19],
    code: 'malformed',
    meaning: 'A name holds NUL or another control character.',
    source: 'CVE-2009-2408',
    remedy: 'Printable characters only.',
  },
  'csr.subject.script': {
    cases: [50],
    code: 'malformed',
    meaning: 'The common name holds characters beyond ASCII: it could be read as another one.',
    source: 'UTS #39 §4',
    remedy: 'Ids are lower-case letters, digits and hyphens.',
  },
  'csr.subject.length': {
    cases: [58],
    code: 'malformed',
    meaning: 'The common name has more than 64 characters.',
    source: 'RFC 5280 §A.1',
    remedy: 'Shorten it.',
  },
  'csr.subject.other': {
    cases: [],
    code: 'forbidden',
    meaning: 'The common name is that of another device than the one that asks.',
    source: 'profile, subject',
    remedy: 'Put the own id into the common name.',
  },
  'csr.subject.id': {
    cases: [],
    code: 'malformed',
    meaning: 'The common name makes no id, not even in lower case, and no other one is given (`ca check-csr` only).',
    source: 'ids: `^[a-z0-9][a-z0-9-]{0,63}$`, not `e-…`',
    remedy: 'Name the device with `--id`.',
  },
  'csr.extension.ca': { cases: [15], code: 'forbidden', meaning: 'The request is for a CA.', source: 'RFC 5280 §4.2.1.9', remedy: ask },
  'csr.extension.critical': {
    cases: [48],
    code: 'unsupported',
    meaning: 'A critical extension is asked for that the profile does not have.',
    source: 'RFC 5280 §4.2',
    remedy: ask,
  },
  'csr.extension.value': {
    cases: [],
    code: 'malformed',
    meaning: 'An extension that is asked for does not have the form of its kind.',
    source: 'RFC 5280 §4.2.1',
    remedy: encoder,
  },
  'csr.usage.ca': { cases: [16], code: 'forbidden', meaning: 'keyCertSign or cRLSign is asked for.', source: 'RFC 5280 §4.2.1.3', remedy: ask },
  'csr.usage': { cases: [], code: 'forbidden', meaning: 'A key usage is asked for that the profile does not have.', source: 'RFC 5280 §4.2.1.3', remedy: ask },
  'csr.purpose': {
    cases: [51],
    code: 'forbidden',
    meaning: 'An extended key usage is asked for that the profile does not have (anyExtendedKeyUsage, codeSigning, serverAuth, …).',
    source: 'RFC 5280 §4.2.1.12',
    remedy: ask,
  },
  'csr.name': { cases: [], code: 'malformed', meaning: 'An alternative name is no GeneralName of its kind.', source: 'RFC 5280 §4.2.1.6', remedy: encoder },
  'csr.name.control': {
    cases: [18],
    code: 'malformed',
    meaning: 'An alternative name holds NUL or other characters beyond printable ASCII.',
    source: 'CVE-2009-2408',
    remedy: 'Printable ASCII only.',
  },
  'csr.name.kind': {
    cases: [49],
    code: 'forbidden',
    meaning: 'An alternative name is of a kind that the profile does not have: wildcard, address, mail, …',
    source: 'profile, alternative names',
    remedy: ask,
  },
  'csr.name.other': {
    cases: [17],
    code: 'forbidden',
    meaning: 'An alternative name is another than the one that the certificate will carry: somebody else’s.',
    source: 'profile, alternative names',
    remedy: ask,
  },
} as const satisfies Readonly<Record<string, RequestReason>>

/** What only the server can know: refused when the certificate would be issued. */
const known = {
  'key.reused': {
    cases: [42],
    code: 'forbidden',
    meaning: 'Another device, or a station, has or had a certificate for this key.',
    source: 'unique index on SHA-256 of the SPKI',
    remedy: 'Make a key on each device; an image that was copied carries the key of its original.',
  },
  'key.revoked': {
    cases: [43, 52],
    code: 'forbidden',
    meaning: 'The key is that of a revoked certificate: an old request played again, or a key that may be known.',
    source: 'RFC 5280 §5.3.1',
    remedy: 'Make a new key.',
  },
  'key.authority': {
    cases: [43],
    code: 'forbidden',
    meaning: 'The key is one of this server or its CAs.',
    source: 'CA/B BR §6.1.1.3',
    remedy: 'Make a new key.',
  },
  'key.other-purpose': {
    cases: [44],
    code: 'forbidden',
    meaning: 'The device has a certificate of another profile for this key (its identity key as TLS key).',
    source: 'SP 800-57 Part 1 §5.2',
    remedy: 'One key, one purpose: make another one.',
  },
  'csr.station.other-key': {
    cases: [],
    code: 'forbidden',
    meaning: 'The request is for another key than the one by which the station is known.',
    source: 'the key that its owner handed over (`station add`)',
    remedy: 'Make the request with the key of the station; another key is another station: `station add`.',
  },
  'csr.ldevid.other-key': {
    cases: [53],
    code: 'attestation-failed',
    meaning: 'The request is for another key than the one that the TPM certified.',
    source: 'TPM 2.0 Part 3, TPM2_Certify',
    remedy: 'Request the certificate for the key in the TPM; the agent does.',
  },
} as const satisfies Readonly<Record<string, RequestReason>>

/** The one table of reasons for which a request is refused. docs/pki.md is written from it. */
export const requestReasons = { ...encoding, ...key, ...possession, ...wishes, ...known }
export type RequestReasonCode = keyof typeof requestReasons

/** Refuses: the public code is the row's, the reason and its detail reach only the audit entry (and whoever runs `ca check-csr`). */
export const refuseRequest = (reason: RequestReasonCode, detail?: string, cause?: unknown): never => {
  const { code, meaning } = requestReasons[reason]
  throw new Problem(code, detail ?? meaning, { reason, cause })
}

/** What whoever made the request does about it; null for a code that is none of the table. */
export const reasonedRemedy = (reason: string): string | null =>
  Object.hasOwn(requestReasons, reason) ? ((requestReasons as Readonly<Record<string, RequestReason>>)[reason]?.remedy ?? null) : null

const sections = [
  ['Encoding', encoding],
  ['Key', key],
  ['Proof of possession', possession],
  ['What is asked for', wishes],
  ['What the server knows', known],
] as const satisfies readonly (readonly [string, Readonly<Record<string, RequestReason>>])[]

const cell = (text: string): string => text.replaceAll('|', '\\|')

/** The table as docs/pki.md has it. */
export const requestReasonsMarkdown = (): string =>
  sections
    .map(([title, table]) =>
      [
        `### ${title}`,
        '',
        '| reason | case | told | meaning | source | remedy |',
        '|---|---|---|---|---|---|',
        ...Object.entries<RequestReason>(table).map(
          ([reason, { cases, code, meaning, source, remedy }]) =>
            `| \`${reason}\` | ${cases.join(', ') || '–'} | \`${code}\` | ${cell(meaning)} | ${cell(source)} | ${cell(remedy)} |`,
        ),
      ].join('\n'),
    )
    .join('\n\n')
