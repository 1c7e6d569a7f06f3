import { spawn } from 'node:child_process'
import { constants } from 'node:os'
import { fileURLToPath } from 'node:url'
import { exit, text, writeResult, type Command } from '../command.ts'

export const serverCommands: readonly Command[] = [
  {
    name: 'server start',
    usage:
      '[--data DIR] [--tenant NAME] [--host ADDRESS] [--mqtt-port N] [--https-port N] [--http-port N] [--est-port N] [--status-url URL] [--name HOSTNAME]… [--kms file] [--passphrase-file F] [--config F] [--recoveries COUNT/DAYSd]',
    summary: 'start the server; its first start makes the CA, the KEK and the first token, and prints where they are',
    args: [0, 0],
    options: {
      tenant: { type: 'string' },
      host: { type: 'string' },
      'mqtt-port': { type: 'string' },
      'https-port': { type: 'string' },
      'http-port': { type: 'string' },
      'est-port': { type: 'string' },
      'status-url': { type: 'string' },
      name: { type: 'string', multiple: true },
      kms: { type: 'string' },
      'passphrase-file': { type: 'string' },
      config: { type: 'string' },
      recoveries: { type: 'string' },
    },
    async run(call) {
      const args = ['--data', call.data]
      for (const option of [
        'tenant',
        'host',
        'mqtt-port',
        'https-port',
        'http-port',
        'est-port',
        'status-url',
        'kms',
        'passphrase-file',
        'config',
        'recoveries',
      ]) {
        const value = text(call, option)
        if (value !== undefined) args.push(`--${option}`, value)
      }
      const names = call.options['name']
      for (const name of Array.isArray(names) ? names : []) args.push('--name', name)
      if (call.out.json) args.push('--json')
      const child = spawn(process.execPath, [fileURLToPath(import.meta.resolve('@fleetkey/server/main.ts')), ...args], { stdio: 'inherit' })
      for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => child.kill(signal))
      const { promise, resolve, reject } = Promise.withResolvers<number>()
      child.on('error', reject)
      child.on('exit', (code, signal) => resolve(code ?? 128 + (signal === null ? 0 : constants.signals[signal])))
      return await promise
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
