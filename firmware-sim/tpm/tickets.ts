import { concat, empty, sized, u16, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg, handle as known, tag } from '@fleetkey/tpm2/constants.ts'
import { hmac } from '@fleetkey/tpm2/kdf.ts'
import type { Machine } from './machine.ts'

/** Secret of a hierarchy with which the TPM recognises what it has said itself (Part 1 §11.4.6.3). */
const proofOf = (machine: Machine, hierarchy: number): Uint8Array => {
  switch (hierarchy) {
    case known.owner:
      return machine.durable.proof
    case known.endorsement:
      return machine.durable.endorsementProof
    case known.platform:
      return machine.durable.platformProof
    default:
      return machine.nullSeed
  }
}

const mac = (machine: Machine, hierarchy: number, ...parts: readonly Uint8Array[]): Uint8Array => hmac(alg.sha512, proofOf(machine, hierarchy), ...parts)

/** Digest of each kind of ticket (Part 2 §10.7). */
export const ticketDigest = {
  creation: (machine: Machine, hierarchy: number, name: Uint8Array, creationHash: Uint8Array): Uint8Array =>
    mac(machine, hierarchy, u16(tag.creation), name, creationHash),
  verified: (machine: Machine, hierarchy: number, digest: Uint8Array, keyName: Uint8Array): Uint8Array =>
    mac(machine, hierarchy, u16(tag.verified), digest, keyName),
  hash: (machine: Machine, hierarchy: number, of: { hash: number; digest: Uint8Array }): Uint8Array =>
    mac(machine, hierarchy, u16(tag.hashcheck), u16(of.hash), of.digest),
  secret: (machine: Machine, hierarchy: number, of: { timeout: Uint8Array; cpHash: Uint8Array; ref: Uint8Array; name: Uint8Array }): Uint8Array =>
    mac(machine, hierarchy, u16(tag.authSecret), of.cpHash, of.ref, of.name, of.timeout, u32(machine.durable.starts)),
} as const

/** TPMT_TK of any kind. */
export const marshalTicket = (kind: number, hierarchy: number, digest: Uint8Array): Uint8Array => concat(u16(kind), u32(hierarchy), sized(digest))
/** A ticket that says nothing. */
export const nullTicket = (kind: number): Uint8Array => marshalTicket(kind, known.null, empty)

/** Obfuscates the counters of quotes outside the endorsement and platform hierarchies. */
export const obfuscationProof = (machine: Machine): Uint8Array => proofOf(machine, known.owner)
