declare const proof: unique symbol

/**
 * What is proven authentic and fresh about a device. Proof is a type: only a method's `verify` makes it (`makeClaims` is
 * called there and nowhere else), so policy can take nothing less.
 */
export interface Claims extends ClaimsContent {
  readonly [proof]: true
}

export interface ClaimsContent {
  readonly method: 'tpm2'
  /** Hex SHA-256 of the EK's TPMT_PUBLIC: the hardware. */
  readonly ekHash: string
  /** `simulated` when a test endorsement vouches for the EK. */
  readonly assurance: 'simulated' | 'attested'
  /** Subject of the endorsement that vouches for the EK; null when the signed batch manifest alone does. */
  readonly endorsement: string | null
  /** TPM names of the proven keys. */
  readonly ak: Uint8Array
  readonly srk: Uint8Array
  readonly ldevid: Uint8Array
  readonly recipient: Uint8Array
  /** TPMT_PUBLIC of the keys that something is wrapped to. */
  readonly srkPublic: Uint8Array
  readonly recipientPublic: Uint8Array
  /** DER SubjectPublicKeyInfo. */
  readonly ldevidSpki: Uint8Array
  readonly tlsSpki: Uint8Array
  /** PCR index → hex SHA-256 value, replayed from the log and confirmed by the quote. */
  readonly pcrs: Readonly<Record<string, string>>
  readonly events: number
  readonly resetCount: number
  readonly restartCount: number
  readonly clockSafe: boolean
  readonly firmwareVersion: bigint
}

export const makeClaims = (content: ClaimsContent): Claims => content as Claims
