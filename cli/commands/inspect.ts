import { readFileSync } from 'node:fs'
import { isFrame } from '@fleetkey/protocol/chunks.ts'
import { decode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import { exit, UsageError, type Command } from '../command.ts'

const limit = 4 << 20

/** Any decoded value as readable JSON: bytes become hexadecimal text. */
export const readable = (value: unknown): unknown => {
  if (value instanceof Uint8Array) return Buffer.from(value).toString('hex')
  if (Array.isArray(value)) return value.map(readable)
  if (typeof value === 'object' && value !== null) return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, readable(inner)]))
  return value
}

/** The bytes of a file that holds them raw, as hexadecimal or as base64. */
const bytesOf = (content: Buffer): Uint8Array => {
  const text = content.toString('latin1').trim()
  if (/^(?:[0-9a-fA-F]{2}\s*)+$/.test(text)) return Buffer.from(text.replaceAll(/\s/g, ''), 'hex')
  if (text.length >= 16 && /^[A-Za-z0-9+/_\-\s]+={0,2}$/.test(text)) return Buffer.from(text.replaceAll(/\s/g, ''), 'base64')
  return content
}

/** What a file holds: a signed message (not verified: that needs the sender's key), a frame of one, or plain CBOR. */
export const inspect = (bytes: Uint8Array): unknown => {
  if (isFrame(bytes)) {
    const [transfer, index, data] = decode(bytes) as [Uint8Array, number, Uint8Array]
    return { kind: 'frame', transfer: readable(transfer), index, length: data.length }
  }
  try {
    const message = readMessage(bytes, { max: limit })
    return { kind: 'message', kid: readable(message.kid), envelope: readable(message.envelope), signature: readable(message.signature), verified: false }
  } catch (error) {
    if (!(error instanceof Problem)) throw error
    const reason = error.message
    try {
      return { kind: 'cbor', value: readable(decode(bytes)), notAMessage: reason }
    } catch {
      throw new UsageError(`neither a message nor CBOR: ${reason}`)
    }
  }
}

export const inspectCommands: readonly Command[] = [
  {
    name: 'inspect',
    usage: 'FILE|-',
    summary: 'print a message of the wire (raw, hexadecimal or base64) as readable JSON; signatures are not verified',
    args: [1, 1],
    async run(call) {
      const [path = '-'] = call.args
      let content: Buffer
      try {
        content = readFileSync(path === '-' ? 0 : path)
      } catch (error) {
        throw new UsageError(error instanceof Error ? error.message : String(error))
      }
      if (content.length > 2 * limit) throw new UsageError(`${path} is longer than any message`)
      process.stdout.write(`${JSON.stringify(inspect(bytesOf(content)), null, 2)}\n`)
      return exit.ok
    },
  },
]
