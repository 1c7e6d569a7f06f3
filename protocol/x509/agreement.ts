import type { X509Certificate } from 'node:crypto'
import { directoryNames, nameAttributes, type NameAttribute } from './name.ts'

/**
 * Whether OpenSSL reads the same names from a certificate as our own reader: a certificate that two parsers read differently is an attack. Both take the text
 * of OpenSSL apart only as far as it is unambiguous.
 */

/** Every value of the subject, whatever OpenSSL calls its attribute. */
export const sameSubject = (native: X509Certificate, subject: Uint8Array): boolean => {
  const attributes = nameAttributes(subject)
  // As OpenSSL prints names of one attribute a line, each by its name: then nothing is left to compare.
  if (attributes.map(printed).join('\n') === ((native.subject as string | undefined) ?? '')) return true
  const legacy = native.toLegacyObject().subject as unknown as Readonly<Record<string, string | readonly string[]>> | undefined
  const theirs = Object.values(legacy ?? {}).flat()
  const ours = attributes.map(({ value }) => value)
  return theirs.length === ours.length && theirs.toSorted().every((value, at) => value === ours.toSorted()[at])
}

/** Short names that OpenSSL (3.5) has for the attributes of a TPM; an older one dumps the DER of the value in hex. */
const shortNames: Readonly<Record<string, string>> = {
  '2.5.4.3': 'CN',
  '2.5.4.5': 'serialNumber',
  '2.5.4.6': 'C',
  '2.5.4.7': 'L',
  '2.5.4.8': 'ST',
  '2.5.4.9': 'street',
  '2.5.4.10': 'O',
  '2.5.4.11': 'OU',
  '2.5.4.17': 'postalCode',
  '0.9.2342.19200300.100.1.25': 'DC',
  '1.2.840.113549.1.9.1': 'emailAddress',
  '2.23.133.2.1': 'tcg-at-tpmManufacturer',
  '2.23.133.2.2': 'tcg-at-tpmModel',
  '2.23.133.2.3': 'tcg-at-tpmVersion',
}

const isControl = (char: string): boolean => char < ' ' || char === '\u007f'

const escapedChar = (char: string): string => {
  if (isControl(char)) return `\\${(char.codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(2, '0')}`
  return ',+"\\<>;'.includes(char) ? `\\${char}` : char
}

/** RFC 4514 §2.4 as OpenSSL writes it. */
const escaped = (value: string): string => (/^[\w.:()/-][\w.:()/ -]*$/.test(value) && !value.endsWith(' ') ? value : escapedThroughout(value))

const escapedThroughout = (value: string): string =>
  Array.from(value, escapedChar)
    .join('')
    .replace(/^([ #])/, '\\$1')
    .replace(/ $/, '\\ ')

const printed = ({ type, value }: NameAttribute): string => `${shortNames[type] ?? type}=${escaped(value)}`

/** A Name the way `XN_FLAG_RFC2253` prints it (RFC 4514): backwards. */
export const nameText = (name: readonly NameAttribute[]): string =>
  name
    .toReversed()
    .map((attribute, at, all) => `${at === 0 ? '' : all[at - 1]?.rdn === attribute.rdn ? '+' : ','}${printed(attribute)}`)
    .join('')

/** Every directory name of the subjectAltName; what else stands there is compared by its being there. */
export const sameAltNames = (native: X509Certificate, altNames: readonly Uint8Array[]): boolean => {
  const text = native.subjectAltName
  if (text === undefined || altNames.length === 0) return text === undefined && altNames.length === 0
  const names = directoryNames(altNames)
  if (names.length === 0) return !text.includes('DirName:')
  // Node quotes what holds a comma as a JSON string, the comma as \u002c; a backslash is then doubled.
  const plain = text.replaceAll(/"((?:[^"\\]|\\.)*)"/g, (quoted) => JSON.parse(quoted) as string)
  return names.every((name) => plain.includes(`DirName:${nameText(name)}`))
}
