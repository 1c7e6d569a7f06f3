import { isBytes, hasExactly } from './shape.ts'

/** Keys in the folder, encrypted under what a passphrase or a key file gives. */
export interface FileBackend {
  readonly kind: 'file'
  /** File with the passphrase: read by the process itself, the server never sees it. */
  readonly passphraseFile: string | null
  /** Where the key file is, when there is no passphrase; null: in the folder. */
  readonly keyFile: string | null
}

/** Where the keys are, and what it takes to reach them. */
export type Backend = FileBackend

/** What the server tells its KMS process on standard input, once, before anything else. */
export interface Orders {
  /** Folder of the keys, and of what the process has to know about keys that are elsewhere. */
  readonly folder: string
  readonly backend: Backend
  /** Path of the socket to make; its folder is this start's own. */
  readonly socket: string
  /** 32 bytes that whoever connects must know. New at each start. */
  readonly secret: Uint8Array
  /** Report each named durable step on descriptor 3, and go on when the server says so. For fault runs. */
  readonly steps: boolean
}

const isPath = (value: unknown): value is string => typeof value === 'string' && value.length > 0 && value.length <= 4096
const isPathOrNull = (value: unknown): value is string | null => value === null || isPath(value)

const backends: { readonly [K in Backend['kind']]: (value: unknown) => boolean } = {
  file: (value) => hasExactly(value, ['kind', 'passphraseFile', 'keyFile']) && isPathOrNull(value['passphraseFile']) && isPathOrNull(value['keyFile']),
}

const isBackend = (value: unknown): value is Backend => {
  const kind = typeof value === 'object' && value !== null && 'kind' in value ? value.kind : undefined
  return typeof kind === 'string' && Object.hasOwn(backends, kind) && backends[kind as Backend['kind']](value)
}

export const isOrders = (value: unknown): value is Orders =>
  hasExactly(value, ['folder', 'backend', 'socket', 'secret', 'steps']) &&
  isPath(value['folder']) &&
  isBackend(value['backend']) &&
  isPath(value['socket']) &&
  isBytes(value['secret'], 32) &&
  value['secret'].length === 32 &&
  typeof value['steps'] === 'boolean'
