import { parseArgs, type ParseArgsConfig } from 'node:util'
import type { z } from 'zod'

/** The command line is wrong. */
export class UsageError extends Error {
  override readonly name = 'UsageError'
}

export const required = (value: string | undefined, option: string): string => {
  if (value === undefined) throw new UsageError(`${option} is missing`)
  return value
}

export const parsed = <T>(schema: z.ZodType<T>, value: unknown, option: string): T => {
  const result = schema.safeParse(value)
  if (!result.success) throw new UsageError(`${option}: ${result.error.issues[0]?.message ?? 'not acceptable'}`)
  return result.data
}

export const optionsOf = <T extends NonNullable<ParseArgsConfig['options']>>(argv: readonly string[], options: T) => {
  try {
    return parseArgs({ args: [...argv], options }).values
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message : String(error))
  }
}

/** A number from an option, `otherwise` when it is not given. */
export const whole = (schema: z.ZodType<number>, value: string | undefined, otherwise: number, option: string): number =>
  parsed(schema, value === undefined ? otherwise : Number(value), option)
