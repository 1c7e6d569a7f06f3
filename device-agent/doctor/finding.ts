export type Grade = 'ok' | 'warn' | 'fail'

/** One thing that was looked at. `remedy`: empty when nothing has to be done. */
export interface Finding {
  readonly check: string
  readonly grade: Grade
  readonly found: string
  readonly remedy: string
}

export const ok = (check: string, found: string): Finding => ({ check, grade: 'ok', found, remedy: '' })
export const warn = (check: string, found: string, remedy: string): Finding => ({ check, grade: 'warn', found, remedy })
export const fail = (check: string, found: string, remedy: string): Finding => ({ check, grade: 'fail', found, remedy })

export const messageOf = (thrown: unknown): string => (thrown instanceof Error ? thrown.message : String(thrown))
