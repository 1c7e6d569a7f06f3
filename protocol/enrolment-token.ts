import { Problem } from './problem.ts'
import { Secret } from './secret.ts'

/** A single-use enrolment token. `id` is public and names it; `secret` is what its holder knows. */
export interface EnrolmentToken {
  /** 16 bytes. */
  readonly id: Uint8Array
  /** 32 bytes. */
  readonly secret: Secret
}

const prefix = 'fkt1-'
const idLength = 16
const secretLength = 32

/** One line of text: what the operator hands to a device. */
export const tokenText = ({ id, secret }: EnrolmentToken): string => `${prefix}${Buffer.concat([id, secret.bytes()]).toString('base64url')}`

/** The token in a text; white space around it is forgiven. Throws Problem('malformed') that shows nothing of it. */
export const parseToken = (text: string): EnrolmentToken => {
  const line = text.trim()
  if (!/^fkt1-[A-Za-z0-9_-]{64}$/.test(line)) throw new Problem('malformed', 'not an enrolment token', { reason: 'token.malformed' })
  const bytes = Buffer.from(line.slice(prefix.length), 'base64url')
  const token = { id: new Uint8Array(bytes.subarray(0, idLength)), secret: new Secret(bytes.subarray(idLength)) }
  bytes.fill(0)
  return token
}

/** A new token from `random`. */
export const newToken = (random: (length: number) => Uint8Array): EnrolmentToken => ({ id: random(idLength), secret: new Secret(random(secretLength)) })
