import type { View } from './view.ts'

/** One rule of the lint. `source`: where it is written; `says`: what must be so; `holds`: whether it is. */
export interface Rule {
  readonly source: string
  readonly says: string
  readonly holds: (view: View) => boolean
}

export type Rules = Readonly<Record<string, Rule>>

export const same = (a: Uint8Array | undefined, b: Uint8Array): boolean => a !== undefined && Buffer.compare(a, b) === 0
