import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Hierarchy } from '@fleetkey/tpm2/errors.ts'
import { SettingsError, type PasswordFiles } from './config.ts'
import type { FileSystem } from './filesystem.ts'

/** TPM2B_AUTH at most: the longest digest. */
const longest = 64

/** What a password file holds: its bytes without one line end, or hexadecimal after `hex:`. */
const parse = (file: string, content: Uint8Array): Secret => {
  const line = Buffer.from(content.buffer, content.byteOffset, content.length)
  const end = line.at(-1) !== 0x0a ? line.length : line.at(-2) === 0x0d ? line.length - 2 : line.length - 1
  const text = line.subarray(0, end)
  const isHex = text.subarray(0, 4).toString('latin1') === 'hex:'
  const hex = text.subarray(4).toString('latin1')
  if (isHex && (hex.length % 2 !== 0 || !/^[0-9a-f]*$/i.test(hex))) throw new SettingsError(`${file}: not hexadecimal after "hex:"`)
  const bytes = isHex ? Buffer.from(hex, 'hex') : text
  if (bytes.length === 0) throw new SettingsError(`${file}: empty; a hierarchy without a password needs no file`)
  if (bytes.length > longest) throw new SettingsError(`${file}: ${bytes.length} bytes; a TPM takes ${longest} at most`)
  const secret = new Secret(bytes)
  bytes.fill(0)
  return secret
}

/** Reads the passwords of the TPM's hierarchies. Throws SettingsError with what to correct; never with what a file holds. */
export const readPasswords = async (read: FileSystem['read'], files: PasswordFiles): Promise<Readonly<Partial<Record<Hierarchy, Secret>>>> => {
  const passwords: Partial<Record<Hierarchy, Secret>> = {}
  for (const name of ['owner', 'endorsement', 'lockout'] as const) {
    const file = files[name]
    if (file === undefined) continue
    const content = await read(file).catch((thrown: unknown) => {
      throw new SettingsError(`password of the ${name} hierarchy: ${thrown instanceof Error ? thrown.message : String(thrown)}`)
    })
    if (content === undefined) throw new SettingsError(`password of the ${name} hierarchy: ${file} is not there`)
    passwords[name] = parse(file, content)
    content.fill(0)
  }
  return passwords
}
