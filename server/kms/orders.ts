import { hasExactly, isBytes, isCount } from './shape.ts'

/** Keys in the folder, encrypted under what a passphrase or a key file gives. */
export interface FileBackend {
  readonly kind: 'file'
  /** File with the passphrase: read by the process itself, the server never sees it. */
  readonly passphraseFile: string | null
  /** Where the key file is, when there is no passphrase; null: in the folder. */
  readonly keyFile: string | null
}

/** Keys in a PKCS#11 token, which makes them and never gives them away. */
export interface Pkcs11Backend {
  readonly kind: 'pkcs11'
  /** Folder of pkcs11js, as `fleetkey kms install-pkcs11` makes it. */
  readonly addon: string
  /** The token's library. */
  readonly module: string
  /** Label or serial number of the token. */
  readonly token: string
  /** File with the user's PIN: read by the process itself, at every login. */
  readonly pinFile: string
  /** Operations at a time. */
  readonly sessions: number
  /** Variables of the environment that the library reads. */
  readonly variables: Readonly<Record<string, string>>
  /** For keys that are still in files. */
  readonly files: FileBackend
}

/** Keys in AWS KMS, which makes them and never gives them away. */
export interface AwsBackend {
  readonly kind: 'aws'
  readonly region: string
  /** Another address than AWS's own; null: that one. */
  readonly endpoint: string | null
  /** Variables of the environment that the SDK finds its credentials by. */
  readonly variables: Readonly<Record<string, string>>
  /** For keys that are still in files. */
  readonly files: FileBackend
}

/** Where the keys are, and what it takes to reach them. */
export type Backend = FileBackend | Pkcs11Backend | AwsBackend

/** Sessions of a token that can be asked for. */
export const maxSessions = 64

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

const isVariables = (value: unknown): boolean =>
  typeof value === 'object' &&
  value !== null &&
  Object.getPrototypeOf(value) === Object.prototype &&
  Object.keys(value).length <= 32 &&
  Object.values(value).every((one) => typeof one === 'string')

const backends: { readonly [K in Backend['kind']]: (value: unknown) => boolean } = {
  file: (value) => hasExactly(value, ['kind', 'passphraseFile', 'keyFile']) && isPathOrNull(value['passphraseFile']) && isPathOrNull(value['keyFile']),
  pkcs11: (value) =>
    hasExactly(value, ['kind', 'addon', 'module', 'token', 'pinFile', 'sessions', 'variables', 'files']) &&
    isPath(value['addon']) &&
    isPath(value['module']) &&
    isPath(value['token']) &&
    isPath(value['pinFile']) &&
    isCount(value['sessions'], 1, maxSessions) &&
    isVariables(value['variables']) &&
    isBackend(value['files']) &&
    value['files'].kind === 'file',
  aws: (value) =>
    hasExactly(value, ['kind', 'region', 'endpoint', 'variables', 'files']) &&
    isPath(value['region']) &&
    isPathOrNull(value['endpoint']) &&
    isVariables(value['variables']) &&
    isBackend(value['files']) &&
    value['files'].kind === 'file',
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
