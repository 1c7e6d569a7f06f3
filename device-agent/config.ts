import { readFileSync } from 'node:fs'
import { dirname, isAbsolute, join, resolve } from 'node:path'
import { Bundle } from '@fleetkey/protocol/admin.ts'
import { KeyId, TenantId } from '@fleetkey/protocol/ids.ts'
import { fromPem } from '@fleetkey/protocol/x509/pem.ts'
import { z } from 'zod'
import type { Hierarchy } from '@fleetkey/tpm2/errors.ts'
import type { Consumer } from './consumers.ts'
import type { FileOwner } from './filesystem.ts'
import { maxSocketPath } from './local-api.ts'
import type { Output } from './outputs.ts'
import type { TrustSource } from './trust.ts'

/** Per hierarchy the file that holds its password: the secret itself is never in the configuration. */
export type PasswordFiles = Readonly<Partial<Record<Hierarchy, string>>>

/** Everything the agent is told from outside; read once. */
export interface Settings {
  readonly server: { readonly host: string; readonly port: number }
  readonly tenant: string
  /** Roots, issuing certificates and the certificates of the server's message keys, DER. */
  readonly trust: TrustSource
  /** Folder of the agent's own files. */
  readonly data: string
  /** As tpm2's openTransport takes it; null: this device has none, and one of the next two. */
  readonly tpm: string | null
  /** Files of a factory identity (IDevID): its private key and its certificates, PEM. */
  readonly idevid?: { readonly key: string; readonly certificates: string }
  /** File of a single-use enrolment token; gone once the device has its identity. */
  readonly token?: string
  /** Files with the passwords of the TPM's hierarchies, where their owner has set any. */
  readonly tpmAuth?: PasswordFiles
  readonly serial: string
  /** File with the firmware's event log; null: this machine has none. */
  readonly eventLog: string | null
  /** File with the kernel's binary list of measured files (Linux IMA); null or left out: this machine has none. */
  readonly imaList?: string | null
  /** Socket for local applications; null: none. */
  readonly socket: { readonly path: string; readonly owner: FileOwner } | null
  readonly outputs: readonly Output[]
  /** Consumers that must be connected to the socket, and ready, before the use of an epoch of their key is proven. */
  readonly consumers?: readonly Consumer[]
  /** Milliseconds that a consumer has to get ready for an epoch; 10 s when left out. */
  readonly readyWithin?: number
}

/** The configuration is not usable: text for the person who wrote it. */
export class SettingsError extends Error {
  override readonly name = 'SettingsError'
}

const mode = z
  .string()
  .regex(/^0?[0-7]{3}$/, { message: 'expected an octal mode such as "0640"' })
  .transform((text) => Number.parseInt(text, 8))
const account = z.union([z.int().min(0), z.string().min(1).max(64)])
const path = z.string().min(1).max(4096)

export const defaultEventLog = '/sys/kernel/security/tpm0/binary_bios_measurements'

export const defaultImaList = '/sys/kernel/security/ima/binary_runtime_measurements'

/** The file `agent.json`. Relative paths are taken from its folder. */
export const AgentFile = z.strictObject({
  bundle: path,
  data: path,
  tpm: z
    .string()
    .regex(/^(device|unix|tcp):.+$/, { message: 'expected device:/dev/tpmrm0, unix:PATH or tcp:HOST:PORT' })
    .optional(),
  idevid: z.strictObject({ key: path, certificates: path }).optional(),
  token: path.optional(),
  tpmAuth: z.strictObject({ ownerAuthFile: path.optional(), endorsementAuthFile: path.optional(), lockoutAuthFile: path.optional() }).optional(),
  /** Left out: the serial number of the board (device tree). */
  serial: z.string().min(1).max(64).optional(),
  eventLog: path.nullable().optional(),
  imaList: path.nullable().optional(),
  socket: z
    .union([path, z.strictObject({ path, mode: mode.optional(), owner: account.optional(), group: account.optional() })])
    .nullable()
    .optional(),
  outputs: z
    .array(
      z.strictObject({
        key: KeyId,
        path,
        format: z.enum(['raw', 'base64', 'json']).optional(),
        mode: mode.optional(),
        owner: account.optional(),
        group: account.optional(),
        hook: z.array(z.string().max(4096)).min(1).max(64).optional(),
        /** Seconds that the hook may take. */
        hookTimeout: z.number().min(0.1).max(600).optional(),
      }),
    )
    .max(256)
    .optional(),
  consumers: z
    .array(z.strictObject({ key: KeyId, name: z.string().regex(/^[a-z0-9][a-z0-9-]{0,31}$/) }))
    .max(256)
    .optional(),
  /** Seconds. */
  readyWithin: z.number().min(0.1).max(600).optional(),
})
export type AgentFile = z.infer<typeof AgentFile>

const readText = (file: string, what: string): string => {
  try {
    return readFileSync(file, 'utf8')
  } catch (error) {
    throw new SettingsError(`${what} ${file}: ${error instanceof Error ? error.message : String(error)}`)
  }
}

const readJson = <T>(file: string, what: string, schema: z.ZodType<T>): T => {
  let value: unknown
  try {
    value = JSON.parse(readText(file, what))
  } catch (error) {
    if (error instanceof SettingsError) throw error
    throw new SettingsError(`${what} ${file} is not JSON: ${error instanceof Error ? error.message : String(error)}`)
  }
  const parsed = schema.safeParse(value)
  if (parsed.success) return parsed.data
  throw new SettingsError(`${what} ${file}: ${parsed.error.issues.map((issue) => `${issue.path.join('.') || 'the file'}: ${issue.message}`).join('; ')}`)
}

/** User or group id from its number or its name in passwd(5) or group(5). */
const idOf = (wanted: string | number, table: '/etc/passwd' | '/etc/group'): number => {
  if (typeof wanted === 'number') return wanted
  const row = readText(table, 'accounts')
    .split('\n')
    .map((line) => line.split(':'))
    .find(([name]) => name === wanted)
  const id = Number(row?.[2])
  if (row === undefined || !Number.isInteger(id)) throw new SettingsError(`${table} has no ${wanted}`)
  return id
}

const ownerOf = (of: { mode?: number | undefined; owner?: string | number | undefined; group?: string | number | undefined }, usual: number): FileOwner => ({
  mode: of.mode ?? usual,
  ...(of.owner === undefined ? {} : { uid: idOf(of.owner, '/etc/passwd') }),
  ...(of.group === undefined ? {} : { gid: idOf(of.group, '/etc/group') }),
})

/** Server, tenant and trust of a bundle (`fleetkey server bundle`). Throws SettingsError. */
export const trustOfBundle = (bundle: Bundle): Pick<Settings, 'server' | 'tenant' | 'trust'> => {
  const url = URL.canParse(bundle.server) ? new URL(bundle.server) : undefined
  if (url?.protocol !== 'mqtts:' || url.hostname === '') throw new SettingsError(`bundle: server "${bundle.server}" is not mqtts://HOST:PORT`)
  const tenant = TenantId.safeParse(bundle.tenant)
  if (!tenant.success) throw new SettingsError(`bundle: tenant "${bundle.tenant}"`)
  const certificates = (pems: readonly string[], field: string): readonly Uint8Array[] => {
    try {
      return pems.flatMap((pem) => fromPem('CERTIFICATE', pem))
    } catch (error) {
      throw new SettingsError(`bundle: ${field}: ${error instanceof Error ? error.message : String(error)}`)
    }
  }
  return {
    server: { host: url.hostname.replace(/^\[|\]$/g, ''), port: url.port === '' ? 8883 : Number(url.port) },
    tenant: tenant.data,
    trust: { trust: certificates(bundle.trust, 'trust'), chain: certificates(bundle.chain, 'chain'), keys: certificates(bundle.keys, 'keys') },
  }
}

const boardSerial = (): string => {
  const file = '/proc/device-tree/serial-number'
  const serial = readText(file, 'no "serial" in the configuration, and the board tells none:').replace(/\0/g, '').trim()
  if (serial === '' || serial.length > 64) throw new SettingsError(`no "serial" in the configuration, and ${file} holds none`)
  return serial
}

const passwordFiles = (of: NonNullable<AgentFile['tpmAuth']>, at: (name: string) => string): PasswordFiles => ({
  ...(of.ownerAuthFile === undefined ? {} : { owner: at(of.ownerAuthFile) }),
  ...(of.endorsementAuthFile === undefined ? {} : { endorsement: at(of.endorsementAuthFile) }),
  ...(of.lockoutAuthFile === undefined ? {} : { lockout: at(of.lockoutAuthFile) }),
})

const tpmSpec = (spec: string, at: (name: string) => string): string => {
  const [kind, tpm] = [spec.slice(0, spec.indexOf(':')), spec.slice(spec.indexOf(':') + 1)]
  return kind === 'tcp' ? spec : `${kind}:${at(tpm)}`
}

/** Settings from `agent.json` and the bundle that it names. Throws SettingsError with what to correct. */
export const readSettings = (file: string): Settings => {
  const config = readJson(file, 'configuration', AgentFile)
  const folder = dirname(resolve(file))
  const at = (name: string): string => (isAbsolute(name) ? name : join(folder, name))
  const bundle = readJson(at(config.bundle), 'bundle', Bundle)
  const socket = typeof config.socket === 'string' ? { path: config.socket } : config.socket
  if (socket !== null && socket !== undefined && Buffer.byteLength(at(socket.path)) > maxSocketPath)
    throw new SettingsError(`socket: ${at(socket.path)} has more than ${maxSocketPath} bytes; choose a short path such as /run/fleetkey/agent.sock`)
  const paths = (config.outputs ?? []).map((output) => resolve(at(output.path)))
  if ((config.consumers ?? []).length > 0 && (socket === null || socket === undefined))
    throw new SettingsError('consumers: they connect to the socket, and there is none; name one in "socket"')
  const twice = paths.find((one, index) => paths.indexOf(one) !== index)
  // The withdrawal of the one key would take the other's file away.
  if (twice !== undefined) throw new SettingsError(`outputs: two of them write ${twice}`)
  if ([config.tpm, config.idevid, config.token].filter((one) => one !== undefined).length !== 1)
    throw new SettingsError('configuration: exactly one of "tpm", "idevid" and "token" says how this device proves what it is')
  return {
    ...trustOfBundle(bundle),
    data: at(config.data),
    tpm: config.tpm === undefined ? null : tpmSpec(config.tpm, at),
    ...(config.idevid === undefined ? {} : { idevid: { key: at(config.idevid.key), certificates: at(config.idevid.certificates) } }),
    ...(config.token === undefined ? {} : { token: at(config.token) }),
    ...(config.tpmAuth === undefined ? {} : { tpmAuth: passwordFiles(config.tpmAuth, at) }),
    serial: config.serial ?? boardSerial(),
    eventLog: config.eventLog === undefined ? (config.tpm === undefined ? null : defaultEventLog) : config.eventLog === null ? null : at(config.eventLog),
    imaList: config.imaList === undefined ? (config.tpm === undefined ? null : defaultImaList) : config.imaList === null ? null : at(config.imaList),
    socket: socket === null || socket === undefined ? null : { path: at(socket.path), owner: ownerOf(socket, 0o660) },
    outputs: (config.outputs ?? []).map((output) => ({
      key: output.key,
      path: at(output.path),
      format: output.format ?? 'raw',
      owner: ownerOf(output, 0o600),
      hook: output.hook ?? null,
      ...(output.hookTimeout === undefined ? {} : { hookTimeout: output.hookTimeout * 1000 }),
    })),
    ...(config.consumers === undefined ? {} : { consumers: config.consumers }),
    ...(config.readyWithin === undefined ? {} : { readyWithin: config.readyWithin * 1000 }),
  }
}
