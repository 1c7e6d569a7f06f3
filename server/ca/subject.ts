import { der, oid, sequence, set, tags, utf8 } from '@fleetkey/protocol/x509/der.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'

/** What may stand in front of the common name, in the order in which it is written; `most`: characters (the upper bounds of RFC 5280 §A.1). */
export const subjectAttributes = {
  C: { oid: oids.country, most: 2 },
  ST: { oid: oids.state, most: 128 },
  L: { oid: oids.locality, most: 128 },
  O: { oid: oids.organization, most: 64 },
  OU: { oid: oids.organizationalUnit, most: 64 },
} as const
export type SubjectAttribute = keyof typeof subjectAttributes
export const attributeNames = Object.keys(subjectAttributes) as readonly SubjectAttribute[]

/** Attributes besides the common name. */
export type SubjectSettings = { readonly [N in SubjectAttribute]?: string | undefined }

/** A country is a PrintableString of two letters (ISO 3166), everything else a UTF8String (RFC 5280 §4.1.2.4, §A.1). */
const attribute = (name: SubjectAttribute, value: string): Uint8Array =>
  set(sequence(oid(subjectAttributes[name].oid), name === 'C' ? der(tags.printable, Buffer.from(value, 'latin1')) : utf8(value)))

/** Each with its value, as they are written. */
export const attributesOf = (subject: SubjectSettings): readonly (readonly [SubjectAttribute, string])[] =>
  attributeNames.flatMap((name) => {
    const value = subject[name]
    return value === undefined ? [] : [[name, value] as const]
  })

const prefixes = new WeakMap<SubjectSettings, readonly Uint8Array[]>()

/** Relative names in front of the common name, DER, in order. */
export const relativeNames = (subject: SubjectSettings): readonly Uint8Array[] => {
  const known = prefixes.get(subject)
  if (known !== undefined) return known
  const made = attributesOf(subject).map(([name, value]) => attribute(name, value))
  prefixes.set(subject, made)
  return made
}

/** Name, DER: these attributes, then the common name. */
export const subjectOf = (subject: SubjectSettings, commonName: string): Uint8Array =>
  sequence(...relativeNames(subject), set(sequence(oid(oids.commonName), utf8(commonName))))

/**
 * Why a value cannot stand there; undefined when it can. Letters and digits of any script, spaces and a few signs: nothing that RFC 4514 escapes but the comma,
 * nothing invisible, and one way to write each character.
 */
export const refuseValue = (name: SubjectAttribute, value: string): string | undefined => {
  if (name === 'C') return /^[A-Z]{2}$/.test(value) ? undefined : 'not a country of two capital letters (ISO 3166)'
  const { most } = subjectAttributes[name]
  if (value === '' || Array.from(value).length > most) return `not 1 to ${most} characters`
  if (value.normalize('NFC') !== value) return 'not in the composed form of Unicode (NFC)'
  if (!/^[\p{L}\p{N}][\p{L}\p{M}\p{N} &'(),./:@_-]*$/u.test(value) || /\s\s|\s$/.test(value))
    return "letters, digits, single spaces and &'(),./:@_- only, a letter or digit first"
  return undefined
}
