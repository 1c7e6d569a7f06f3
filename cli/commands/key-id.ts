import { KeyId } from '@fleetkey/protocol/ids.ts'
import { UsageError } from '../command.ts'

/** The name of a key, or a usage error. */
export const keyId = (value: string): KeyId => {
  const parsed = KeyId.safeParse(value)
  if (!parsed.success) throw new UsageError(`'${value}' is no key name: lower-case letters, digits and dashes, at most 64`)
  return parsed.data
}
