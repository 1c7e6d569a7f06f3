import { join, resolve } from 'node:path'
import { Refused } from '../client.ts'
import { exit, text, type Command } from '../command.ts'
import { facts, table } from '../output.ts'
import { InstallError, installPkcs11js, pkcs11js } from '../offline/pkcs11js.ts'

export const kmsCommands: readonly Command[] = [
  {
    name: 'kms install-pkcs11',
    usage: '[--data DIR] [--to DIR] [--tarball FILE]',
    summary: `build pkcs11js ${pkcs11js.version}, which --kms pkcs11 needs, from its published source with the compiler of this machine`,
    args: [0, 0],
    options: { to: { type: 'string' }, tarball: { type: 'string' } },
    run(call) {
      const folder = resolve(text(call, 'to') ?? join(call.data, 'pkcs11js'))
      try {
        const built = installPkcs11js({ folder, tarball: text(call, 'tarball') })
        call.out.result({ folder, version: pkcs11js.version, built }, () => `pkcs11js ${pkcs11js.version} ${built ? 'built in' : 'is in'} ${folder}`)
        return Promise.resolve(exit.ok)
      } catch (error) {
        if (error instanceof InstallError) throw new Refused('unavailable', error.message)
        throw error
      }
    },
  },
  {
    name: 'kms status',
    usage: '',
    summary: 'where each key of the server is, how often it was used, and which KEK wraps',
    args: [0, 0],
    async run(call) {
      const status = await call.client().call('kms.status')
      call.out.result(status, () =>
        [
          facts({ 'new keys': status.backend, KEK: status.kek, 'not retired': status.former.join(', ') || null }),
          '',
          table([['KEY', 'PURPOSE', 'IN', 'USES'], ...status.keys.map(({ name, purpose, place, uses }) => [name, purpose, place, String(uses)])]),
        ].join('\n'),
      )
      return exit.ok
    },
  },
  {
    name: 'kms rotate-kek',
    usage: '',
    summary: 'make another KEK where new keys are made now, and wrap with it what the one before has wrapped',
    args: [0, 0],
    async run(call) {
      const done = await call.client().call('kms.rotate-kek')
      call.out.result(done, () => `${done.kek} wraps; ${done.rewrapped} rows wrapped anew; ${done.former.join(', ')} is still there; next: kms retire-kek`)
      return exit.ok
    },
  },
  {
    name: 'kms retire-kek',
    usage: '',
    summary: 'destroy the KEK before the present one; copies of the database from before it was rotated open nothing then',
    args: [0, 0],
    async run(call) {
      const done = await call.client().call('kms.retire-kek')
      call.out.result(done, () => (done.already ? `nothing to retire: ${done.kek} is the only KEK` : `${done.kek} is the only KEK`))
      return exit.ok
    },
  },
]
