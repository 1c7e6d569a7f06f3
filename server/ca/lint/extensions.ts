import { isHostName } from '@fleetkey/protocol/x509/general-names.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'
import { roleEku } from '@fleetkey/protocol/x509/roles.ts'
import { isBounded } from '../purposes.ts'
import { altNamesOf, extensionsOf, issuerKeyIdentifier, keyIdentifier, noCheckValue, statusValues } from '../tbs.ts'
import { same, type Rules } from './rule.ts'
import type { Node } from './tree.ts'
import { latin1, type View } from './view.ts'

const { crlDistributionPoints, authorityInfoAccess, ocspNoCheck } = oids
const { basicConstraints, keyUsage, extKeyUsage, subjectAltName, subjectKeyIdentifier, authorityKeyIdentifier } = oids
const rootOf = (view: View, id: string): Node | undefined => view.extension(id)?.tree?.root

/** What its own rule says about whether it belongs there. */
const ownRule: ReadonlySet<string> = new Set([extKeyUsage, subjectAltName, crlDistributionPoints, authorityInfoAccess, ocspNoCheck])
const saysStatus = ({ profile, issuer }: View): boolean => profile.status === true && issuer.status !== undefined

/** An extension that is there must be so; that it is there is another rule's. */
const where = (id: string, rule: (root: Node, view: View) => boolean) => (view: View) => {
  const root = rootOf(view, id)
  return root === undefined || rule(root, view)
}
const present = (id: string, wanted: (view: View) => boolean) => (view: View) => (view.extension(id) !== undefined) === wanted(view)
const critical = (id: string, wanted: boolean) => (view: View) => (view.extension(id)?.critical ?? wanted) === wanted
const always = (): boolean => true

const isCa = ({ children: [flag] }: Node): boolean => flag?.tag === 0x01 && flag.content[0] !== 0
const pathLength = ({ children }: Node): number | null => children.find(({ tag }) => tag === 0x02)?.content.at(-1) ?? null
const usagesOf = ({ content: [, ...bytes] }: Node): ReadonlySet<number> =>
  new Set(bytes.flatMap((byte, at) => [0, 1, 2, 3, 4, 5, 6, 7].filter((bit) => (byte & (0x80 >> bit)) !== 0).map((bit) => at * 8 + bit)))
const hasUsage = (view: View, bit: number): boolean => {
  const root = rootOf(view, keyUsage)
  return root !== undefined && usagesOf(root).has(bit)
}
const purposes = ({ children }: Node): readonly string[] => children.map(({ oid }) => oid)
/** The profile's own: the role that was ordered, where it has roles. */
const ownPurpose = ({ profile: { eku }, order: { role } }: View): string | null => (eku === 'role' && role !== undefined ? roleEku[role] : eku)
const sameSet = <T>(a: ReadonlySet<T>, b: ReadonlySet<T>): boolean => a.size === b.size && [...a].every((one) => b.has(one))
const ofTag = (tag: number, rule: (content: Uint8Array) => boolean) =>
  where(subjectAltName, ({ children }) => children.every((name) => name.tag !== tag || rule(name.content)))

const kindsOf = ({ profile: { names, patterns } }: View): readonly number[] =>
  names === 'hosts' ? [0x82, 0x87] : patterns.some(({ kind }) => kind === 'DNS') ? [0x86, 0x82] : [0x86]
const isUri = (content: Uint8Array): boolean => /^[a-z][a-z0-9+.-]*:[\x21-\x7e]+$/i.test(latin1(content))
const isAddress = ({ length }: Uint8Array): boolean => length === 4 || length === 16

/** Extensions (RFC 5280 §4.2). */
export const extensionRules = {
  'extension.unique': {
    source: 'RFC 5280 §4.2',
    says: 'no extension twice',
    holds: ({ extensions }) => new Set(extensions.map(({ id }) => id)).size === extensions.length,
  },
  'extension.known': {
    source: 'profile',
    says: 'no extension that is none of the profile',
    holds: ({ extensions, profile, issuer }) => {
      const known = extensionsOf(profile, issuer)
      // That a known one is superfluous is said by its own rule.
      return extensions.every(({ id }) => known.has(id) || ownRule.has(id))
    },
  },
  'extension.value': {
    source: 'RFC 5280 §4.2',
    says: 'values that are elements of their kind',
    holds: ({ extensions }) => extensions.every(({ id, tree }) => tree !== undefined && (kinds[id] ?? tree.root.tag) === tree.root.tag),
  },
  'basic-constraints.present': { source: 'RFC 5280 §4.2.1.9', says: 'basic constraints', holds: present(basicConstraints, always) },
  'basic-constraints.critical': { source: 'RFC 5280 §4.2.1.9', says: 'basic constraints are critical', holds: critical(basicConstraints, true) },
  'basic-constraints.ca': {
    source: 'RFC 5280 §4.2.1.9',
    says: 'CA exactly as the profile says',
    holds: where(basicConstraints, (root, { profile }) => isCa(root) === (profile.ca !== null)),
  },
  'basic-constraints.path': {
    source: 'RFC 5280 §4.2.1.9',
    says: 'the path length of the profile, none without CA',
    holds: where(basicConstraints, (root, { profile }) => pathLength(root) === (isCa(root) ? profile.ca : null)),
  },
  'key-usage.present': { source: 'RFC 5280 §4.2.1.3', says: 'key usage', holds: present(keyUsage, always) },
  'key-usage.critical': { source: 'RFC 5280 §4.2.1.3', says: 'key usage is critical', holds: critical(keyUsage, true) },
  'key-usage.profile': {
    source: 'profile; RFC 5280 §4.2.1.3',
    says: 'exactly the usages of the profile',
    holds: where(keyUsage, (root, { profile }) => sameSet(usagesOf(root), new Set<number>(profile.usages.map((usage) => keyUsages[usage])))),
  },
  'key-usage.ca': {
    source: 'RFC 5280 §4.2.1.3',
    says: 'keyCertSign and cRLSign for CAs only',
    holds: (view) => view.profile.ca !== null || (!hasUsage(view, keyUsages.keyCertSign) && !hasUsage(view, keyUsages.crlSign)),
  },
  'ext-key-usage.present': {
    source: 'profile; RFC 5280 §4.2.1.12',
    says: 'extended key usage exactly where the profile has one',
    holds: present(extKeyUsage, ({ profile }) => profile.eku !== null),
  },
  'ext-key-usage.critical': { source: 'CA/B BR §7.1.2.7', says: 'extended key usage is not critical', holds: critical(extKeyUsage, false) },
  'ext-key-usage.profile': {
    source: 'profile; RFC 5280 §4.2.1.12',
    says: 'exactly the purposes of the profile',
    holds: where(
      extKeyUsage,
      (root, view) => view.profile.eku === null || sameSet(new Set(purposes(root)), new Set([ownPurpose(view), ...view.profile.purposes])),
    ),
  },
  'ext-key-usage.any': {
    source: 'CA/B BR §7.1.2.7',
    says: 'no anyExtendedKeyUsage',
    holds: where(extKeyUsage, (root) => !purposes(root).includes(oids.anyExtendedKeyUsage)),
  },
  'ext-key-usage.bounds': {
    source: 'this CA: a purpose that lets in or signs for others belongs to one profile',
    says: 'no purpose of another profile, or of Fleetkey, and none that no configuration may add',
    holds: where(extKeyUsage, (root, view) => {
      const [own, wanted] = [ownPurpose(view), view.profile.purposes]
      // What the profile does not have is said by its own rule; so is anyExtendedKeyUsage.
      return purposes(root).every((purpose) => !wanted.includes(purpose) || purpose === oids.anyExtendedKeyUsage || isBounded(purpose, own))
    }),
  },
  'ext-key-usage.unique': {
    source: 'RFC 5280 §4.2.1.12',
    says: 'no purpose twice',
    holds: where(extKeyUsage, (root) => new Set(purposes(root)).size === root.children.length),
  },
  'ext-key-usage.usage': {
    source: 'RFC 5280 §4.2.1.12',
    says: 'digitalSignature with the purposes of TLS',
    holds: where(
      extKeyUsage,
      (root, view) =>
        !purposes(root).some((purpose) => purpose === oids.serverAuth || purpose === oids.clientAuth) ||
        view.extension(keyUsage) === undefined ||
        hasUsage(view, keyUsages.digitalSignature),
    ),
  },
  'subject-key.present': { source: 'RFC 5280 §4.2.1.2', says: 'a subject key identifier', holds: present(subjectKeyIdentifier, always) },
  'subject-key.critical': { source: 'RFC 5280 §4.2.1.2', says: 'the subject key identifier is not critical', holds: critical(subjectKeyIdentifier, false) },
  'subject-key.value': {
    source: 'RFC 7093 §2',
    says: 'the first 160 bits of SHA-256 of the key',
    holds: where(subjectKeyIdentifier, ({ content }, { spki }) => same(content, keyIdentifier(spki.bytes))),
  },
  'authority-key.present': { source: 'RFC 5280 §4.2.1.1', says: 'an authority key identifier', holds: present(authorityKeyIdentifier, always) },
  'authority-key.critical': {
    source: 'RFC 5280 §4.2.1.1',
    says: 'the authority key identifier is not critical',
    holds: critical(authorityKeyIdentifier, false),
  },
  'authority-key.form': {
    source: 'CA/B BR §7.1.2.11',
    says: 'the key identifier alone',
    holds: where(authorityKeyIdentifier, ({ children }) => children.length === 1 && children[0]?.tag === 0x80),
  },
  'authority-key.value': {
    source: 'RFC 5280 §4.2.1.1',
    says: 'the subject key identifier of the issuer',
    holds: where(authorityKeyIdentifier, ({ children }, { issuer }) =>
      children.every(({ tag, content }) => tag !== 0x80 || same(content, issuerKeyIdentifier(issuer))),
    ),
  },
  'alt-name.present': {
    source: 'profile; RFC 5280 §4.2.1.6',
    says: 'alternative names exactly where the profile has them',
    holds: present(subjectAltName, ({ profile }) => profile.names !== null),
  },
  'alt-name.critical': {
    source: 'RFC 5280 §4.2.1.6',
    says: 'alternative names are critical without a subject, and only then',
    holds: (view) => (view.extension(subjectAltName)?.critical ?? view.attributes.length === 0) === (view.attributes.length === 0),
  },
  'alt-name.empty': { source: 'RFC 5280 §4.2.1.6', says: 'at least one alternative name', holds: where(subjectAltName, ({ children }) => children.length > 0) },
  'alt-name.kind': {
    source: 'profile',
    says: 'URIs for devices and stations, host names where the profile has them, host names and addresses for servers',
    holds: where(subjectAltName, ({ children }, view) => view.profile.names === null || children.every(({ tag }) => kindsOf(view).includes(tag))),
  },
  'alt-name.uri': {
    source: 'RFC 3986 §3',
    says: 'absolute URIs in ASCII',
    holds: ofTag(0x86, isUri),
  },
  'alt-name.dns': {
    source: 'RFC 1034 §3.5; CA/B BR §7.1.4.2',
    says: 'host names without wildcard or underscore',
    holds: ofTag(0x82, (content) => !latin1(content).includes('*') && isHostName(latin1(content))),
  },
  'alt-name.ip': { source: 'RFC 5280 §4.2.1.6', says: 'addresses of 4 or 16 bytes', holds: ofTag(0x87, isAddress) },
  'alt-name.unique': {
    source: 'CA/B BR §7.1.4.2',
    says: 'no alternative name twice',
    holds: where(
      subjectAltName,
      ({ children }) => children.length < 2 || new Set(children.map(({ bytes }) => Buffer.from(bytes).toString('hex'))).size === children.length,
    ),
  },
  'alt-name.order': {
    source: 'this CA: nothing is taken from a request',
    says: 'the names that were ordered',
    holds: where(subjectAltName, ({ children }, view) => {
      // Names of another kind or form are said by their own rules.
      const told = children.filter(
        ({ tag, content }) => kindsOf(view).includes(tag) && (tag !== 0x87 || isAddress(content)) && (tag !== 0x86 || isUri(content)),
      )
      if (view.profile.names === null || children.length === 0) return true
      const wanted = altNamesOf(view.profile, view.order, view.of.tenant)
      return told.every(({ bytes }) => wanted.some((name) => same(name, bytes))) && wanted.every((name) => told.some(({ bytes }) => same(name, bytes)))
    }),
  },
  'status.present': {
    source: 'profile; RFC 5280 §4.2.1.13, §4.2.2.1',
    says: 'a distribution point and places to ask exactly where the profile has them and the server offers them',
    holds: (view) =>
      (view.extension(crlDistributionPoints) !== undefined) === saysStatus(view) && (view.extension(authorityInfoAccess) !== undefined) === saysStatus(view),
  },
  'status.critical': {
    source: 'RFC 5280 §4.2.1.13, §4.2.2.1, RFC 6960 §4.2.2.2.1',
    says: 'what is said about revocation is not critical',
    holds: (view) => [crlDistributionPoints, authorityInfoAccess, ocspNoCheck].every((id) => view.extension(id)?.critical !== true),
  },
  'status.places': {
    source: 'this CA: nothing is taken from a request',
    says: 'the places of this server, the list of this serial',
    holds: (view) => {
      const { status } = view.issuer
      if (status === undefined || !saysStatus(view)) return true
      const wanted = statusValues(status, view.of.serial)
      const [crl, access] = [view.extension(crlDistributionPoints), view.extension(authorityInfoAccess)]
      return (crl === undefined || same(crl.value, wanted.crl)) && (access === undefined || same(access.value, wanted.access))
    },
  },
  'status.no-check': {
    source: 'RFC 6960 §4.2.2.2.1',
    says: 'id-pkix-ocsp-nocheck, with NULL, for OCSP responders and nobody else',
    holds: (view) => {
      const value = view.extension(ocspNoCheck)?.value
      return view.profile.noCheck === true ? same(value, noCheckValue) : value === undefined
    },
  },
} as const satisfies Rules

const kinds: Readonly<Record<string, number>> = {
  [basicConstraints]: 0x30,
  [keyUsage]: 0x03,
  [extKeyUsage]: 0x30,
  [subjectAltName]: 0x30,
  [subjectKeyIdentifier]: 0x04,
  [authorityKeyIdentifier]: 0x30,
}
