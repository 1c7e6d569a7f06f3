import { isBytes, hasExactly } from './shape.ts'

/** What the server tells its KMS process on standard input, once, before anything else. */
export interface Orders {
  /** Folder of the keys. */
  readonly folder: string
  /** Path of the socket to make; its folder is this start's own. */
  readonly socket: string
  /** 32 bytes that whoever connects must know. New at each start. */
  readonly secret: Uint8Array
  /** File with the passphrase: read by the process itself, the server never sees it. */
  readonly passphraseFile: string | null
  readonly keyFile: string | null
  /** Report each named durable step on descriptor 3, and go on when the server says so. For fault runs. */
  readonly steps: boolean
}

const isPath = (value: unknown): value is string => typeof value === 'string' && value.length > 0 && value.length <= 4096

export const isOrders = (value: unknown): value is Orders =>
  hasExactly(value, ['folder', 'socket', 'secret', 'passphraseFile', 'keyFile', 'steps']) &&
  isPath(value['folder']) &&
  isPath(value['socket']) &&
  isBytes(value['secret'], 32) &&
  value['secret'].length === 32 &&
  (value['passphraseFile'] === null || isPath(value['passphraseFile'])) &&
  (value['keyFile'] === null || isPath(value['keyFile'])) &&
  typeof value['steps'] === 'boolean'
