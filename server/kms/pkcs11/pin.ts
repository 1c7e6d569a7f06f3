import { argon2Sync } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { removeFile, replaceFile } from '../durable.ts'
import { hasExactly, isBytes } from '../shape.ts'
import { ck, returnValue, rv, type Cryptoki, type Handle } from './cryptoki.ts'

/**
 * Logging in without ever locking the token: tokens lock after a few wrong PINs, and a service that is started again and again would use them up. A PIN that
 * was refused is remembered (by a hash that is slow to compute; it is a wrong PIN) and not tried again, and nothing is tried when one try is left.
 */
export interface PinPlace {
  readonly folder: string
  readonly pinFile: string
  readonly random: (length: number) => Uint8Array
}

const problem = (code: 'unauthenticated' | 'unavailable' | 'malformed', detail: string): Problem => new Problem(code, detail, { reason: 'kms.pin' })

/** The end of a line is no part of it. */
const pinIn = (path: string): Secret => {
  let bytes: Buffer
  try {
    bytes = readFileSync(path)
  } catch (cause) {
    throw new Problem('unavailable', `the PIN file ${path} cannot be read: ${cause instanceof Error ? cause.message : String(cause)}`, {
      reason: 'kms.pin-file',
      cause,
    })
  }
  try {
    let { length } = bytes
    if (bytes[length - 1] === 0x0a) length--
    if (bytes[length - 1] === 0x0d) length--
    if (length < 1 || length > 255) throw problem('malformed', `${path} holds no PIN: 1 to 255 bytes`)
    return new Secret(bytes.subarray(0, length))
  } finally {
    bytes.fill(0)
  }
}

const refusedFile = (folder: string): string => join(folder, 'pin-refused.cbor')

/** RFC 9106 §4, second recommended option. */
const hashOf = (pin: Secret, salt: Uint8Array): Secret =>
  new Secret(argon2Sync('argon2id', { message: pin.bytes(), nonce: salt, parallelism: 4, tagLength: 32, memory: 65_536, passes: 3 }))

const wasRefused = (folder: string, pin: Secret): boolean => {
  const path = refusedFile(folder)
  if (!existsSync(path)) return false
  let value: unknown
  try {
    value = decode(readFileSync(path))
  } catch {
    return false
  }
  if (!hasExactly(value, ['salt', 'hash']) || !isBytes(value['salt'], 32) || !isBytes(value['hash'], 32)) return false
  return value['hash'].length === 32 && hashOf(pin, value['salt']).equals(new Secret(value['hash']))
}

/** Logs every session of this process in. Throws Problem with reason `kms.pin`: the PIN is wrong, or was not tried, and trying again does not help. */
export const login = (cryptoki: Cryptoki, session: Handle, slot: Handle, { folder, pinFile, random }: PinPlace): void => {
  const { flags } = cryptoki.C_GetTokenInfo(slot)
  if ((flags & ck.flag.locked) !== 0) throw problem('unauthenticated', 'the token has locked its PIN: unlock it with its SO PIN')
  if ((flags & ck.flag.finalTry) !== 0)
    throw problem('unauthenticated', 'the token has one try left before it locks its PIN: log in to it with its own tool first')
  const pin = pinIn(pinFile)
  try {
    if (wasRefused(folder, pin)) throw problem('unauthenticated', `the token has refused the PIN in ${pinFile} before; it is not tried again: correct the file`)
    cryptoki.C_Login(session, ck.user, Buffer.from(pin.bytes()).toString('utf8'))
  } catch (cause) {
    const code = returnValue(cause)?.code
    if (code === rv.alreadyLoggedIn) return
    if (code === rv.pinIncorrect) {
      const salt = random(32)
      const hash = hashOf(pin, salt)
      replaceFile(refusedFile(folder), encode({ salt, hash: new Uint8Array(hash.bytes()) }))
      throw problem('unauthenticated', `the token refuses the PIN in ${pinFile}; it is not tried again: correct the file`)
    }
    if (code === rv.pinLocked) throw problem('unauthenticated', 'the token has locked its PIN: unlock it with its SO PIN')
    if (code === rv.pinExpired) throw problem('unauthenticated', 'the PIN of the token has expired: set another')
    if (code === rv.pinInvalid || code === rv.pinLength) throw problem('unauthenticated', `what is in ${pinFile} cannot be a PIN of this token`)
    throw cause
  } finally {
    pin.destroy()
  }
  if (existsSync(refusedFile(folder))) removeFile(refusedFile(folder))
}
