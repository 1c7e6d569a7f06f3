/**
 * Why evidence is refused. `cases`: the numbers of the acceptance list that the code answers (docs/attestation.md). `meaning`: what was found;
 * `attack`: what it would let in; `remedy`: what whoever runs an honest device does about it.
 */
export interface Reason {
  readonly cases: readonly number[]
  readonly meaning: string
  readonly attack: string
  readonly remedy: string
}

export type ReasonTable = Readonly<Record<string, Reason>>
