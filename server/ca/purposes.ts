import { oids } from '@fleetkey/protocol/x509/oids.ts'
import { fleetkeyArc } from '@fleetkey/protocol/x509/roles.ts'

/**
 * Extended key usages that a configuration may add to a profile, by name. Not among them: what lets somebody in here or signs for others (serverAuth, clientAuth,
 * OCSPSigning, timeStamping, the roles of this server, …), which belongs to one profile or to none; and emailProtection: no certificate names a mailbox.
 */
export const namedPurposes = {
  /** RFC 4334: 802.1X and the like. */
  eapOverLAN: '1.3.6.1.5.5.7.3.14',
  eapOverPPP: '1.3.6.1.5.5.7.3.13',
  /** RFC 4945 §5.1.3.12. */
  ipsecIKE: '1.3.6.1.5.5.7.3.17',
} as const
export type NamedPurpose = keyof typeof namedPurposes

const enterprises = '1.3.6.1.4.1.'
/** Enterprises whose purposes have a meaning elsewhere: Fleetkey, and Microsoft (smart card logon, agents that enrol for others). */
const foreign = [fleetkeyArc, '1.3.6.1.4.1.311'] as const
const isUnder = (oid: string, arc: string): boolean => oid === arc || oid.startsWith(`${arc}.`)
const isOid = (text: string): boolean =>
  text.length <= 64 && /^[012](\.(0|[1-9]\d{0,9})){1,20}$/.test(text) && text.split('.').every((arc) => Number(arc) < 2 ** 31)

/** A purpose of an enterprise, under the arc that IANA gave it: it means what that enterprise says. */
const isEnterprise = (oid: string): boolean =>
  isOid(oid) && oid.startsWith(enterprises) && oid.split('.').length > enterprises.split('.').length && !foreign.some((arc) => isUnder(oid, arc))

/** The OID that a name or OID stands for; undefined for what no configuration adds. `names`: those that the profile admits. */
export const purposeOf = (said: string, names: readonly NamedPurpose[]): string | undefined => {
  const named = names.find((name) => name === said || namedPurposes[name] === said)
  return named === undefined ? (isEnterprise(said) ? said : undefined) : namedPurposes[named]
}

/** Names of purposes that no certificate carries but of the profile whose own it is; the reason why, for the operator. */
const reserved: Readonly<Record<string, string>> = {
  serverAuth: oids.serverAuth,
  clientAuth: oids.clientAuth,
  OCSPSigning: oids.ocspSigning,
  anyExtendedKeyUsage: oids.anyExtendedKeyUsage,
}

/** Why it is none, in the words of whoever wrote it. */
export const refusePurpose = (said: string, names: readonly NamedPurpose[]): string => {
  const name = Object.entries(reserved).find(([known, oid]) => known === said || oid === said)?.[0]
  if (name === 'anyExtendedKeyUsage') return 'anyExtendedKeyUsage: no certificate is for everything'
  if (name !== undefined) return `${name} belongs to the profile that has it, and to no other`
  if (isUnder(said, fleetkeyArc)) return 'a purpose of Fleetkey: those are the roles and identities that the profiles have'
  return `not ${[...names, `an OID of your own (${enterprises}NUMBER.…)`].join(', ')}`
}

/** Whether it may stand in a certificate beside or as the own purpose of its profile, whatever the profile says: those that are reserved are its own only. */
export const isBounded = (oid: string, own: string | null): boolean =>
  oid === own ||
  (!Object.values(reserved).includes(oid) && !isUnder(oid, fleetkeyArc) && (Object.values<string>(namedPurposes).includes(oid) || isEnterprise(oid)))
