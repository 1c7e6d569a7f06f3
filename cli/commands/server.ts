import { fileURLToPath } from 'node:url'
import { exit, text, writeResult, type Command } from '../command.ts'

const string = { type: 'string' } as const
const flag = { type: 'boolean' } as const
const strings = { type: 'string', multiple: true } as const

/**
 * How node and the C library run a server with very many connections. `--max-semi-space-size`: what lives as short as a message is collected often and fast (4 ms
 * instead of 13 in a storm) and takes 70 MiB less. `MALLOC_…` (glibc's): OpenSSL and node reserve 16 KiB for a connection and use two; apart from everything else the
 * rest takes no memory, as long as the kernel has areas left for such buffers.
 */
export const serverProcess = {
  flags: ['--max-semi-space-size=8'],
  environment: { MALLOC_MMAP_THRESHOLD_: '16384', MALLOC_TRIM_THRESHOLD_: '134217728', MALLOC_MMAP_MAX_: '32768' },
} as const

/** Handed on as they are: the server judges them. */
const startOptions = {
  tenant: string,
  host: string,
  'mqtt-port': string,
  'https-port': string,
  'http-port': string,
  'est-port': string,
  'status-url': string,
  name: strings,
  kms: string,
  'passphrase-file': string,
  'pkcs11-addon': string,
  'pkcs11-module': string,
  'pkcs11-token': string,
  'pkcs11-pin-file': string,
  'pkcs11-sessions': string,
  'pkcs11-env': strings,
  'aws-region': string,
  'aws-endpoint': string,
  config: string,
  recoveries: string,
  attached: flag,
} as const

export const serverCommands: readonly Command[] = [
  {
    name: 'server start',
    usage:
      '[--data DIR] [--tenant NAME] [--host ADDRESS] [--mqtt-port N] [--https-port N] [--http-port N] [--est-port N] [--status-url URL] [--name HOSTNAME]… [--kms file|pkcs11|aws] [--passphrase-file F] [--pkcs11-module LIBRARY] [--pkcs11-token LABEL] [--pkcs11-pin-file F] [--pkcs11-sessions N] [--pkcs11-env NAME[=VALUE]]… [--pkcs11-addon DIR] [--aws-region NAME] [--aws-endpoint URL] [--config F] [--recoveries COUNT/DAYSd] [--attached]',
    summary:
      'start the server; its first start makes the CA, the KEK and the first token, and prints where they are. --attached: it ends when its standard input does',
    args: [0, 0],
    options: startOptions,
    async run(call) {
      const args = ['--data', call.data]
      for (const option of Object.keys(startOptions)) {
        const value = call.options[option]
        if (typeof value === 'string') args.push(`--${option}`, value)
        else if (value === true) args.push(`--${option}`)
        else if (Array.isArray(value)) for (const one of value as readonly string[]) args.push(`--${option}`, one)
      }
      if (call.out.json) args.push('--json')
      // It becomes the server: no process stands between the server and whoever started it, and none is left when that one is killed.
      const program = fileURLToPath(import.meta.resolve('@fleetkey/server/main.ts'))
      process.execve?.(process.execPath, [process.execPath, ...serverProcess.flags, program, ...args], { ...serverProcess.environment, ...process.env })
      throw new Error('this system cannot replace a process by another')
    },
  },
  {
    name: 'server bundle',
    usage: '[--out FILE]',
    summary: 'what a device needs before its first contact: server, tenant, root, message-signing keys',
    args: [0, 0],
    options: { out: { type: 'string' } },
    async run(call) {
      const bundle = `${JSON.stringify(await call.client().call('bundle'), null, 2)}\n`
      const path = text(call, 'out')
      if (path === undefined) process.stdout.write(bundle)
      else writeResult(path, bundle)
      return exit.ok
    },
  },
]
