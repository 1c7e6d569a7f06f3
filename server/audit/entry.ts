/** One act or one refusal. Written in the same commit as its effect; numbered and chained by the store's sequencer. */
export interface AuditEntry {
  readonly at: number
  /** `operator:alice`, `device:abc`, `system:outbox`, `unidentified:10.0.0.0/24` */
  readonly caller: string
  readonly from: string
  readonly action: string
  readonly subject: string
  readonly outcome: 'done' | 'refused'
  /** Public code of a refusal, else null. */
  readonly code: string | null
  /** Why: private reason code and detail, or what was done. Never key bytes. */
  readonly detail: string
}

/** An entry in its place: `leaf` = RFC 6962 leaf hash of its canonical bytes, `previous` = chain hash before it. */
export interface SequencedEntry extends AuditEntry {
  readonly sequence: number
  readonly previous: Uint8Array
  readonly chain: Uint8Array
}
