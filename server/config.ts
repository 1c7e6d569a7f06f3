import { accessSync, constants, existsSync, readFileSync, statSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { TenantId } from '@fleetkey/protocol/ids.ts'
import { z } from 'zod'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Webhook } from './api/webhook.ts'
import { defaultMarks, type AlertSettings } from './ca/alerts.ts'
import { ConfigFile, refuseNames, type ProfileSettings } from './ca/profile-settings.ts'
import { defaultRetention, type Retention } from './ca/retention.ts'
import { defaultBudget, type RecoveryBudget } from './fleet/recovery.ts'
import { maxSessions, type Backend, type FileBackend } from './kms/orders.ts'

const port = z.coerce.number('not a number').int('not a whole number').min(0, 'below 0').max(65_535, 'above 65535')

/** `COUNT/DAYSd`: so many recoveries in so many days. */
const budget = z
  .string()
  .regex(/^[1-9]\d{0,3}\/[1-9]\d{0,2}d$/, 'not a budget such as 8/30d')
  .transform((said): RecoveryBudget => {
    const [count = '', days = ''] = said.slice(0, -1).split('/')
    return { count: Number(count), window: Number(days) * 86_400_000 }
  })

/** Settings of the server: schema first, read once, passed down. Port 0 lets the system choose (the chosen ones are in cli.json). */
export const Settings = z.strictObject({
  data: z.string().min(1),
  tenant: TenantId,
  host: z.string().min(1),
  mqttPort: port,
  httpsPort: port,
  /** Plain HTTP for revocation lists and OCSP; null: not offered. */
  httpPort: port.nullable(),
  /** EST (RFC 7030) for devices without an agent; null: not offered. */
  estPort: port.nullable(),
  /** Where others reach that listener of plain HTTP; certificates name it. Null: they name nothing. */
  statusUrl: z
    .string()
    .regex(/^http:\/\/[A-Za-z0-9.:[\]-]{1,253}(\/[A-Za-z0-9._~-]{1,64}){0,4}$/, 'not a plain http:// URL without a slash at its end')
    .nullable(),
  /** Host names and addresses that devices and operators use; they go into the server's certificate besides localhost. */
  names: z.array(z.string().regex(/^[A-Za-z0-9.:-]{1,253}$/)).max(32),
  /** How often a device may prove itself anew before a person decides. */
  recoveries: budget,
  /** Ends with its standard input: with whoever started it and holds the other end, however that ended. */
  attached: z.boolean(),
  json: z.boolean(),
})
export type Settings = z.infer<typeof Settings> & {
  /** Where the CA keys and the KEK are. Files with secrets that it names are for the KMS process alone: they are not read here. */
  readonly backend: Backend
  /** What certificates are besides what is fixed, within the bounds of each profile. */
  readonly profiles: ProfileSettings
  /** Milliseconds before an end at which alerts are raised, and where they go. */
  readonly alerts: { readonly marks: readonly number[]; readonly webhook: Webhook | undefined }
  /** Of superseded TLS certificates, after their end. */
  readonly retention: Retention
}

/** A setting is wrong: message for the operator, exit code 1. */
export class SettingsError extends Error {
  override readonly name = 'SettingsError'
}

const readable = (path: string, option: string): string => {
  try {
    accessSync(path, constants.R_OK)
    return resolve(path)
  } catch (error) {
    throw new SettingsError(`${option} ${path}: ${error instanceof Error ? error.message : String(error)}`)
  }
}

/** A file with a secret that is not there may still come: until then the keys are sealed. One that may not be read is a mistake. */
const secretFile = (path: string, option: string): string => (existsSync(path) ? readable(path, option) : resolve(path))

const maxFile = 64 << 10

const fileOf = (path: string | undefined): ConfigFile => {
  if (path === undefined) return {}
  let content: unknown
  try {
    const bytes = readFileSync(path)
    if (bytes.length > maxFile) throw new Error('more than 64 KiB')
    content = JSON.parse(bytes.toString('utf8'))
  } catch (error) {
    throw new SettingsError(`--config ${path}: ${error instanceof Error ? error.message : String(error)}`)
  }
  const parsed = ConfigFile.safeParse(content)
  if (parsed.success) return parsed.data
  throw new SettingsError(parsed.error.issues.map((issue) => `--config ${path}: ${issue.path.join('.') || 'the file'}: ${issue.message}`).join('; '))
}

const fileText = (path: string, option: string, max: number): string => {
  try {
    const bytes = readFileSync(path)
    if (bytes.length > max) throw new Error(`more than ${max} bytes`)
    return bytes.toString('utf8')
  } catch (error) {
    throw new SettingsError(`${option} ${path}: ${error instanceof Error ? error.message : String(error)}`)
  }
}

/** The key of a webhook's signatures, as Standard Webhooks spells it. Its file is its owner's alone, or the server does not start. */
const webhookSecret = (path: string): Secret => {
  const option = 'alerts.webhook.secretFile'
  const encoded = /^whsec_([A-Za-z0-9+/]+={0,2})\s*$/.exec(fileText(path, option, 1024))?.[1]
  if (encoded === undefined) throw new SettingsError(`${option} ${path}: not whsec_ and base64`)
  const bytes = Buffer.from(encoded, 'base64')
  if (bytes.length < 24 || bytes.length > 64) throw new SettingsError(`${option} ${path}: ${bytes.length} bytes, not 24 to 64`)
  if ((statSync(path).mode & 0o077) !== 0) throw new SettingsError(`${option} ${path}: others may read it (chmod go= ${path})`)
  return new Secret(bytes)
}

const alertsOf = ({ marks, webhook }: AlertSettings): Settings['alerts'] => ({
  marks: marks ?? defaultMarks,
  webhook:
    webhook === undefined
      ? undefined
      : {
          url: new URL(webhook.url),
          secret: webhookSecret(webhook.secretFile),
          ca: webhook.caFile === undefined ? undefined : fileText(webhook.caFile, 'alerts.webhook.caFile', 1 << 20),
        },
})

/** What systemd decrypts for this unit alone (`LoadCredentialEncrypted=fleetkey-passphrase:…`, `fleetkey-pin:…`). */
const credential = (folder: string | undefined, name: string): string | undefined => {
  const path = folder === undefined ? undefined : join(folder, name)
  return path !== undefined && existsSync(path) ? path : undefined
}

/** Each kind of back end reads what it takes from the command line and the environment. */
const backends: { readonly [K in Backend['kind']]: (values: Readonly<Record<string, unknown>>, env: NodeJS.ProcessEnv) => Backend } = {
  file: (values, env) => filesOf(values, env),
  pkcs11(values, env) {
    const need = (option: string, variable: string, otherwise?: string): string => {
      const value = textOf(values, option) ?? env[variable] ?? otherwise
      if (value === undefined || value === '') throw new SettingsError(`--kms pkcs11 takes --${option} (or ${variable})`)
      return value
    }
    const sessions = z.coerce
      .number()
      .int()
      .min(1)
      .max(maxSessions)
      .safeParse(textOf(values, 'pkcs11-sessions') ?? 4)
    if (!sessions.success) throw new SettingsError(`--pkcs11-sessions: not a number from 1 to ${maxSessions}`)
    const names = Array.isArray(values['pkcs11-env']) ? (values['pkcs11-env'] as readonly string[]) : []
    const pinFile = need('pkcs11-pin-file', 'FLEETKEY_PKCS11_PIN_FILE', credential(env['CREDENTIALS_DIRECTORY'], 'fleetkey-pin'))
    return {
      kind: 'pkcs11',
      addon: resolve(textOf(values, 'pkcs11-addon') ?? env['FLEETKEY_PKCS11_ADDON'] ?? join(dataOf(values, env), 'pkcs11js')),
      module: readable(need('pkcs11-module', 'FLEETKEY_PKCS11_MODULE'), '--pkcs11-module'),
      token: need('pkcs11-token', 'FLEETKEY_PKCS11_TOKEN'),
      pinFile: secretFile(pinFile, '--pkcs11-pin-file'),
      sessions: sessions.data,
      variables: Object.fromEntries(
        names.map((said) => {
          const [name = '', ...given] = said.split('=')
          const value = given.length === 0 ? env[name] : given.join('=')
          if (value === undefined) throw new SettingsError(`--pkcs11-env ${name}: there is no such variable`)
          return [name, value]
        }),
      ),
      files: filesOf(values, env),
    }
  },
  aws(values, env) {
    const region = textOf(values, 'aws-region') ?? env['AWS_REGION'] ?? env['AWS_DEFAULT_REGION']
    if (region === undefined || !/^[a-z]{2}(-[a-z]+)+-\d$/.test(region))
      throw new SettingsError('--kms aws takes --aws-region (or AWS_REGION), such as eu-central-1')
    const endpoint = textOf(values, 'aws-endpoint') ?? env['AWS_ENDPOINT_URL_KMS'] ?? null
    if (endpoint !== null && !isSafeEndpoint(endpoint)) throw new SettingsError(`--aws-endpoint ${endpoint}: not an https:// address`)
    const variables = Object.fromEntries(awsVariables.flatMap((name) => (env[name] === undefined ? [] : [[name, env[name]]])))
    return { kind: 'aws', region, endpoint, variables, files: filesOf(values, env) }
  },
}

/** What the SDK of AWS finds credentials by. */
const awsVariables = [
  'AWS_ACCESS_KEY_ID',
  'AWS_SECRET_ACCESS_KEY',
  'AWS_SESSION_TOKEN',
  'AWS_PROFILE',
  'AWS_CONFIG_FILE',
  'AWS_SHARED_CREDENTIALS_FILE',
  'AWS_ROLE_ARN',
  'AWS_ROLE_SESSION_NAME',
  'AWS_WEB_IDENTITY_TOKEN_FILE',
  'AWS_CONTAINER_CREDENTIALS_RELATIVE_URI',
  'AWS_CONTAINER_CREDENTIALS_FULL_URI',
  'AWS_CONTAINER_AUTHORIZATION_TOKEN',
  'AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE',
  'AWS_EC2_METADATA_DISABLED',
  'HOME',
] as const

/** Never in the clear to another machine: requests carry plaintext to be wrapped. */
const isSafeEndpoint = (text: string): boolean => {
  if (!URL.canParse(text)) return false
  const { protocol, hostname } = new URL(text)
  return protocol === 'https:' || (protocol === 'http:' && ['127.0.0.1', '[::1]', 'localhost'].includes(hostname))
}

const filesOf = (values: Readonly<Record<string, unknown>>, env: NodeJS.ProcessEnv): FileBackend => {
  const path = textOf(values, 'passphrase-file') ?? env['FLEETKEY_PASSPHRASE_FILE'] ?? credential(env['CREDENTIALS_DIRECTORY'], 'fleetkey-passphrase')
  return { kind: 'file', passphraseFile: path === undefined ? null : secretFile(path, '--passphrase-file'), keyFile: null }
}

const dataOf = (values: Readonly<Record<string, unknown>>, env: NodeJS.ProcessEnv): string => resolve(textOf(values, 'data') ?? env['FLEETKEY_DATA'] ?? 'data')

const textOf = (values: Readonly<Record<string, unknown>>, option: string): string | undefined => {
  const value = values[option]
  return typeof value === 'string' ? value : undefined
}

const backendOf = (kind: string, values: Readonly<Record<string, unknown>>, env: NodeJS.ProcessEnv): Backend => {
  if (!Object.hasOwn(backends, kind)) throw new SettingsError(`--kms: ${kind} is none of ${Object.keys(backends).join(', ')}`)
  return backends[kind as Backend['kind']](values, env)
}

const optionOf: Readonly<Record<string, string>> = {
  data: '--data',
  tenant: '--tenant',
  host: '--host',
  mqttPort: '--mqtt-port',
  httpsPort: '--https-port',
  httpPort: '--http-port',
  estPort: '--est-port',
  statusUrl: '--status-url',
  names: '--name',
  recoveries: '--recoveries',
}

/** Settings from the command line, then the environment (FLEETKEY_DATA, FLEETKEY_KMS, FLEETKEY_PASSPHRASE_FILE, FLEETKEY_PKCS11_…, FLEETKEY_CONFIG, AWS's own), then defaults; what concerns certificates from the configuration file (JSON). Throws SettingsError. */
export const readSettings = (argv: readonly string[], env: NodeJS.ProcessEnv): Settings => {
  let values
  try {
    values = parseArgs({
      args: [...argv],
      options: {
        data: { type: 'string' },
        tenant: { type: 'string' },
        host: { type: 'string' },
        'mqtt-port': { type: 'string' },
        'https-port': { type: 'string' },
        'http-port': { type: 'string' },
        'est-port': { type: 'string' },
        'status-url': { type: 'string' },
        name: { type: 'string', multiple: true },
        recoveries: { type: 'string' },
        kms: { type: 'string' },
        'pkcs11-addon': { type: 'string' },
        'pkcs11-module': { type: 'string' },
        'pkcs11-token': { type: 'string' },
        'pkcs11-pin-file': { type: 'string' },
        'pkcs11-sessions': { type: 'string' },
        'pkcs11-env': { type: 'string', multiple: true },
        'aws-region': { type: 'string' },
        'aws-endpoint': { type: 'string' },
        'passphrase-file': { type: 'string' },
        config: { type: 'string' },
        attached: { type: 'boolean' },
        json: { type: 'boolean' },
      },
    }).values
  } catch (error) {
    throw new SettingsError(error instanceof Error ? error.message : String(error))
  }
  const parsed = Settings.safeParse({
    data: dataOf(values, env),
    tenant: values.tenant ?? 'default',
    host: values.host ?? '127.0.0.1',
    mqttPort: values['mqtt-port'] ?? 8883,
    httpsPort: values['https-port'] ?? 8443,
    httpPort: values['http-port'] ?? null,
    estPort: values['est-port'] ?? null,
    statusUrl: values['status-url'] ?? null,
    names: values.name ?? [],
    recoveries: values.recoveries ?? `${defaultBudget.count}/${defaultBudget.window / 86_400_000}d`,
    attached: values.attached ?? false,
    json: values.json ?? false,
  })
  if (!parsed.success)
    throw new SettingsError(parsed.error.issues.map((issue) => `${optionOf[String(issue.path[0])] ?? issue.path.join('.')}: ${issue.message}`).join('; '))
  const path = values.config ?? env['FLEETKEY_CONFIG']
  const { profiles = {}, alerts = {}, retention = {} } = fileOf(path)
  const { tenant, host, names } = parsed.data
  const refused = refuseNames(profiles, { tenant, hosts: [...names, host] })
  if (refused !== undefined) throw new SettingsError(`--config ${path ?? ''}: ${refused}`)
  return {
    ...parsed.data,
    profiles,
    alerts: alertsOf(alerts),
    retention: retention.superseded === undefined ? defaultRetention : retention.superseded,
    backend: backendOf(values.kms ?? env['FLEETKEY_KMS'] ?? 'file', values, env),
  }
}
