/** Why a certificate is revoked (CRLReason, RFC 5280 §5.3.1), with its number. */
export const crlReasons = {
  unspecified: 0,
  keyCompromise: 1,
  cACompromise: 2,
  affiliationChanged: 3,
  superseded: 4,
  cessationOfOperation: 5,
  /** Suspended: the one reason that can be taken back. */
  certificateHold: 6,
  privilegeWithdrawn: 9,
  aACompromise: 10,
} as const
export type CrlReason = keyof typeof crlReasons

/** Reasons that an operator may give for a revocation: holding is an act of its own, and nobody here is an attribute authority. */
export const revocationReasons = [
  'unspecified',
  'keyCompromise',
  'cACompromise',
  'affiliationChanged',
  'superseded',
  'cessationOfOperation',
  'privilegeWithdrawn',
] as const satisfies readonly CrlReason[]
export type RevocationReason = (typeof revocationReasons)[number]

/** The reason that an operator's words name when they are nothing but one; `unspecified` otherwise. */
export const reasonIn = (words: string): RevocationReason =>
  revocationReasons.find((name) => name.toLowerCase() === words.trim().toLowerCase()) ?? 'unspecified'
