import { inside, readOid, tags, whole } from './der.ts'
import { oids } from './oids.ts'

/** hardwareModuleName (RFC 4108 §5): the kind of hardware, and its number in hex. */
export interface HardwareModuleName {
  readonly type: string
  readonly serial: string
}

/** [0] of GeneralName: an OtherName (RFC 5280 §4.2.1.6). */
const otherNameTag = 0xa0

/** The hardware module names among the GeneralNames of a subjectAltName. Throws Problem('malformed'). */
export const hardwareModuleNames = (altNames: readonly Uint8Array[]): readonly HardwareModuleName[] =>
  altNames
    .filter(([tag]) => tag === otherNameTag)
    .flatMap((name) => {
      const other = inside(whole(name, otherNameTag))
      const id = readOid(other.next(tags.oid))
      const value = other.next(otherNameTag)
      other.end()
      if (id !== oids.hardwareModuleName) return []
      const fields = inside(whole(value.content, tags.sequence))
      const type = readOid(fields.next(tags.oid))
      const serial = Buffer.from(fields.next(tags.octetString).content).toString('hex')
      fields.end()
      return [{ type, serial }]
    })
