import { der, explicit, sequence } from '@fleetkey/protocol/x509/der.ts'

/** DistributionPointName with one URI (RFC 5280 §4.2.1.13, fullName). */
export const fullName = (uri: string): Uint8Array => explicit(0, der(0x86, new TextEncoder().encode(uri)))

/** CRLDistributionPoints with one place; also the form of FreshestCRL. */
export const distributionPoints = (uri: string): Uint8Array => sequence(sequence(explicit(0, fullName(uri))))
